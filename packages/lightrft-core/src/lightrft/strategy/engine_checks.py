"""Compare what an engine can do with what a run needs, before a model is loaded."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import StrategyConfig
    from .engine import EngineCapabilities

logger = logging.getLogger(__name__)


def check_engine(name: str, capabilities: EngineCapabilities, config: StrategyConfig, device_type: str) -> None:
    """Refuse what the engine cannot do, all faults at once; warn about a version that was not tested.

    :param device_type: where the engine would run.
    :raises ConfigError: the faults.
    """
    if problems := engine_faults(name, capabilities, config, device_type):
        raise ConfigError(problems)
    if warning := untested_version(name, capabilities.requires):
        logger.warning("%s", warning)


def engine_faults(name: str, capabilities: EngineCapabilities, config: StrategyConfig, device_type: str) -> list[str]:
    """A sentence for each setting that the engine cannot follow."""
    problems = []
    if config.engine_tp_size > 1 and not capabilities.tensor_parallel:
        problems.append(one_rank_only(name, config.engine_tp_size))
    if device_type not in capabilities.devices:
        problems.append(
            f"--engine_type {name}: does not run on {device_type}; it runs on {', '.join(capabilities.devices)}"
        )
    if config.enable_engine_sleep and config.engine_sleep_level not in capabilities.sleep_levels:
        levels = " or ".join(map(str, capabilities.sleep_levels))
        cure = f"set it to {levels}" if levels else "pass --disable_engine_sleep"
        problems.append(f"--engine_sleep_level {config.engine_sleep_level}: engine {name!r} has no such level; {cure}")
    return problems


def one_rank_only(name: str, size: int) -> str:
    """A sentence for ``--engine_tp_size`` above 1 with an engine that cannot split a model."""
    return (
        f"--engine_tp_size {size}: engine {name!r} runs on one rank only; "
        "set it to 1, or use --engine_type vllm or sglang, which split a model over ranks"
    )


def untested_version(name: str, requires: str | None) -> str | None:
    """A sentence with both versions if the installed one is outside the tested range."""
    untested = None
    for alternative in (requires or "").split(" or "):
        requirement = Requirement(alternative) if alternative else None
        try:
            there = version(requirement.name) if requirement else ""
        except PackageNotFoundError:
            continue
        if requirement is None or requirement.specifier.contains(there, prereleases=True):
            return None
        untested = f"engine {name!r} was tested with {requirement}; {requirement.name} {there} is installed"
    return untested


def check_room(length: int, context: int | None) -> None:
    """:raises ValueError: a prompt of ``length`` tokens fills the context."""
    if context is not None and length >= context:
        raise ValueError(
            f"a prompt of {length} tokens leaves no room for a response in a context of {context}: shorten it "
            "(--prompt_max_len) or extend the context (--max_model_len)"
        )
