"""Restores the trainer's process after each call into vLLM.

vLLM expects to own its process: it sets environment variables, replaces functions of torch on a CPU, draws from the
global random state and freezes the garbage collector. What it needs of these is in place only during a call.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch

from lightrft.strategy.rng import preserved_rng

# Environment in which it is imported and started. A user's setting takes precedence, except for the first.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# Functions that are replaced during a call: those that vLLM's CPU worker replaces by no-ops, and gc.freeze, since what
# vLLM freezes would stay after its end.
_REPLACED: tuple[tuple[Any, str], ...] = (
    (gc, "freeze"),
    (torch, "set_num_threads"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
)


class ProcessGuard:
    """``with guard:`` around every call into vLLM: sets its environment, then restores the trainer's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._environment: dict[str, str | None] = {
            name: value if name == "VLLM_ENABLE_V1_MULTIPROCESSING" else os.environ.get(name, value)
            for name, value in ENVIRONMENT.items()
        }
        self._functions: dict[str, Any] = {"freeze": lambda: None}
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> ProcessGuard:
        assert self._stack is None, "a call into vLLM inside another"
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(preserved_rng(self._device))
        self._stack.enter_context(self._swapped())
        if self._device.type == "cpu":
            # On a CPU vLLM compiles only two lines of its sampler: not worth a C++ compiler and half a minute.
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.__exit__(*error)

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        environment, functions = dict(os.environ), [getattr(owner, name) for owner, name in _REPLACED]
        threads, affinity = torch.get_num_threads(), _affinity()
        _set_environment(self._environment)
        for owner, name in _REPLACED:
            setattr(owner, name, self._functions.get(name, getattr(owner, name)))
        try:
            yield
        finally:
            self._environment = _difference(environment, dict(os.environ))
            _set_environment(_difference(dict(os.environ), environment))
            for (owner, name), original in zip(_REPLACED, functions, strict=True):
                self._functions[name] = getattr(owner, name)
                setattr(owner, name, original)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            if affinity != _affinity():
                os.sched_setaffinity(0, affinity)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _difference(before: dict[str, str], after: dict[str, str]) -> dict[str, str | None]:
    """Changes that turn one environment into the other; None: remove the name."""
    gone: dict[str, str | None] = {name: None for name in before if name not in after}
    return gone | {name: value for name, value in after.items() if before.get(name) != value}


def _set_environment(changes: dict[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
