"""The factory: from settings to a strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import StrategyConfig
from .registry import load_plugin

if TYPE_CHECKING:
    from .strategy_base import StrategyBase


def get_strategy(args: Any = None) -> StrategyBase:
    """The strategy that ``args`` ask for: ``--strategy NAME``, else FSDP2 with ``--fsdp``, else DeepSpeed.

    :param args: a Namespace, dict, :class:`StrategyConfig`, or any object with attributes; kept as ``strategy.args``.
    :raises ConfigError: every fault of the settings at once.
    :raises PluginError: the backend is not installed; says what to ``pip install``.
    """
    config = StrategyConfig.from_args(args).checked()
    cls = load_plugin("strategies", config.backend)
    return cls(args=config if args is None else args)
