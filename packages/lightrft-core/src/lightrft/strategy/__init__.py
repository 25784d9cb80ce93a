"""LightRFT's strategy interface. Names load on first use, so that settings can be read without importing torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch_engine import BatchEngine
    from .config import StrategyConfig
    from .engine import EngineCapabilities, EngineSpec, GenerationOutput, GenerationRequest, RolloutEngine
    from .errors import (
        CheckpointError,
        ConfigError,
        EngineStateError,
        LightRFTError,
        NotBuiltError,
        PluginError,
        PromptError,
        RankTimeoutError,
        RolloutError,
        StaleWeightsError,
        UnfilledModelError,
        WeightSyncError,
    )
    from .fake_strategy import FakeStrategy, get_fake_strategy
    from .lifecycle import EngineStatus
    from .registry import register_engine, register_strategy
    from .sampling import SamplingParams
    from .strategy import get_strategy
    from .strategy_base import StepResult, StrategyBase
    from .weights import SyncReceipt

_HOMES = {
    "config": ["StrategyConfig"],
    "batch_engine": ["BatchEngine"],
    "engine": ["EngineCapabilities", "EngineSpec", "GenerationOutput", "GenerationRequest", "RolloutEngine"],
    "errors": [
        "CheckpointError",
        "ConfigError",
        "EngineStateError",
        "LightRFTError",
        "NotBuiltError",
        "PluginError",
        "PromptError",
        "RankTimeoutError",
        "RolloutError",
        "StaleWeightsError",
        "UnfilledModelError",
        "WeightSyncError",
    ],
    "fake_strategy": ["FakeStrategy", "get_fake_strategy"],
    "lifecycle": ["EngineStatus"],
    "registry": ["register_engine", "register_strategy"],
    "sampling": ["SamplingParams"],
    "strategy": ["get_strategy"],
    "strategy_base": ["StepResult", "StrategyBase"],
    "weights": ["SyncReceipt"],
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
# Class names that the documents give to strategies of other distributions, by registered name.
_PLUGINS = {"DeepspeedStrategy": "deepspeed", "FSDPV2Strategy": "fsdp"}

__all__ = [
    "BatchEngine",
    "CheckpointError",
    "ConfigError",
    "EngineCapabilities",
    "EngineSpec",
    "EngineStateError",
    "EngineStatus",
    "FakeStrategy",
    "GenerationOutput",
    "GenerationRequest",
    "LightRFTError",
    "NotBuiltError",
    "PluginError",
    "PromptError",
    "RankTimeoutError",
    "RolloutEngine",
    "RolloutError",
    "SamplingParams",
    "StaleWeightsError",
    "StepResult",
    "StrategyBase",
    "StrategyConfig",
    "SyncReceipt",
    "UnfilledModelError",
    "WeightSyncError",
    "get_fake_strategy",
    "get_strategy",
    "register_engine",
    "register_strategy",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name in _PLUGINS:
        from .registry import load_plugin

        return load_plugin("strategies", _PLUGINS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PLUGINS])
