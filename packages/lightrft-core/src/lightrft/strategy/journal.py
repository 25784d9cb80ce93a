"""Who is late, with what: every rank notes what it enters, so that a failed collective can name the culprit.

A process-group timeout names no rank. Each rank therefore posts (sequence number, operation, call site) to the
launcher's key-value store before it enters an operation that waits for others; when the wait fails, the ranks that are
behind are read from there.
"""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from .errors import RankTimeoutError

_PACKAGE = str(Path(__file__).parent)


class RankJournal:
    """Posts this rank's operations. Without other ranks it does nothing.

    :param timeout: seconds that an operation may take; named in the error.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.sequence = 0
        self._store = None
        if world_size > 1:
            self._store = dist.PrefixStore("lightrft.journal", dist.distributed_c10d._get_default_store())
            self._store.set_timeout(timedelta(seconds=5))
            self._post("setup_distributed", _call_site())

    @contextlib.contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Everything within waits for the other ranks.

        :raises RankTimeoutError: the wait failed; names the ranks that are behind, their operation and their line.
        """
        if self._store is None:
            yield
            return
        self.sequence += 1
        site = _call_site()
        self._post(name, site)
        begun = time.monotonic()
        try:
            yield
        except (RuntimeError, dist.DistBackendError) as error:
            if not _is_lost_peer(error):
                raise
            raise RankTimeoutError(self._explain(name, site, time.monotonic() - begun)) from error

    def _post(self, name: str, site: str) -> None:
        assert self._store is not None
        self._store.set(str(self.rank), f"{self.sequence}\t{name}\t{site}")

    def _explain(self, name: str, site: str, waited: float) -> str:
        behind = []
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            try:
                sequence, operation, place = self._store.get(str(rank)).decode().split("\t")  # type: ignore[union-attr]
            except (RuntimeError, ValueError) as error:  # the store died with its host: say what is known
                return f"{name} at {site} failed after {waited:.1f} s and the ranks' journal is gone ({error})"
            if int(sequence) < self.sequence:
                behind.append(f"rank {rank}, last seen in {operation} (number {sequence}) at {place}")
        late = "; ".join(behind) or "every other rank had entered it: one of them died or stalled inside"
        return (
            f"{name} (number {self.sequence}) at {site} on rank {self.rank} failed after {waited:.1f} s "
            f"(deadline {self.timeout:g} s, --dist_timeout). Late: {late}"
        )


def watch_calls(model: nn.Module, operation: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
    """Make each call of ``model`` an operation: a sharded model waits for other ranks while it computes.

    As in ``fully_shard`` the class is replaced by a subclass; a hook could not see what other hooks raise.

    :param operation: a bound method, which is not kept alive.
    """
    kind, reference = type(model), weakref.WeakMethod(operation)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        alive = reference()
        with alive("forward") if alive is not None else contextlib.nullcontext():
            return kind.__call__(self, *args, **kwargs)

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    watched = type(kind.__name__, (kind,), {**named, "__call__": __call__})
    model.__class__ = watched


def _is_lost_peer(error: BaseException) -> bool:
    """Does the error come from waiting for a rank, and not from the work itself?"""
    text = str(error).lower()
    signs = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe")
    return isinstance(error, dist.DistBackendError) or any(sign in text for sign in signs)


def _call_site() -> str:
    """The nearest line outside this package and contextlib: where the user called."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename == contextlib.__file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
