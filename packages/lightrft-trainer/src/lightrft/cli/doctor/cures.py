"""From an error in a check to the layer at fault and a cure."""

from __future__ import annotations

from lightrft.strategy.config import LESS_MEMORY, StrategyConfig
from lightrft.strategy.errors import (
    CheckpointError,
    ConfigError,
    EngineStateError,
    HubLayoutError,
    NotBuiltError,
    PluginError,
    RankTimeoutError,
    RolloutError,
    WeightSyncError,
)

NETWORK = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME select the network interface between the nodes"


def layer_of(check: str, config: StrategyConfig) -> str:
    """Who does the work that a check examines."""
    return {
        "ranks": "the launch, or the network between the ranks",
        "model": "the model's folder",
        "training": f"the training backend {config.backend!r}",
        "engine": f"the engine {config.engine_type!r}",
        "weight sync": f"the weight sync from {config.backend!r} to {config.engine_type!r}",
        "generation": f"the engine {config.engine_type!r}",
        "drift": f"the engine {config.engine_type!r}, or the model's weights in it",
        "sleep": f"the engine {config.engine_type!r}, its sleep and wake",
    }[check]


def diagnose(error: BaseException, check: str, config: StrategyConfig) -> tuple[str, str]:
    """(layer at fault, what to do)."""
    layer, engine = layer_of(check, config), config.engine_type
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    unreadable = check == "model" and isinstance(error.__cause__, (OSError, ValueError))
    if isinstance(error, ConfigError) and not unreadable:
        return "the settings", "change the flags that the message names"
    if isinstance(error, PluginError):
        return "the installation", "install or remove what the message names"
    if "OutOfMemory" in names or isinstance(error, MemoryError):
        return "this machine's memory", f"use a smaller model, or flags that need less memory: {LESS_MEMORY}"
    if isinstance(error, RankTimeoutError):
        slow = f"if it was only slow, raise --dist_timeout (now {config.dist_timeout:g} s)"
        return "the rank that the message names", f"look for its last output above; {slow}; between nodes, {NETWORK}"
    if isinstance(error, TimeoutError):
        return layer, f"if the machine is only slow, raise --engine_timeout (now {config.engine_timeout:g} s)"
    if isinstance(error, (NotBuiltError, HubLayoutError)):
        return layer, f"choose what the message suggests, an --engine_type other than {engine}, or another backend"
    if isinstance(error, WeightSyncError):
        return (
            layer,
            "do not train with this engine; try --engine_type hf, and report the output of `lightrft doctor --json`",
        )
    if isinstance(error, (RolloutError, EngineStateError, CheckpointError)):
        return layer, "see the message; if it looks like a bug, report the output of `lightrft doctor --json`"
    if isinstance(error, ImportError):
        return "the installation", f"reinstall what cannot be imported ({error.name or 'see the traceback'})"
    if check == "model":
        return (
            layer,
            "--pretrain must be a hub name or a folder with config.json, weights and tokenizer for transformers",
        )
    return layer, "see the traceback; try another --engine_type, or --fsdp instead of --zero_stage"
