from __future__ import annotations

import pytest
import torch

from lightrft.cli.doctor.cures import diagnose, layer_of
from lightrft.cli.doctor.findings import ON_RANKS
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import ConfigError, NotBuiltError, PluginError, RankTimeoutError, WeightSyncError

CONFIG = StrategyConfig(fsdp=True, engine_type="vllm", dist_timeout=7.0, engine_timeout=9.0)


def test_every_check_has_a_layer() -> None:
    assert all(layer_of(check, CONFIG) for check in ON_RANKS)


@pytest.mark.parametrize(
    ("error", "check", "layer", "cure"),
    [
        (ConfigError(["--sp_size 3: no"]), "ranks", "the settings", "the flags that the message names"),
        (PluginError("no engine"), "engine", "the installation", "install"),
        (torch.OutOfMemoryError("full"), "engine", "this machine's memory", "--engine_mem_util"),
        (RankTimeoutError("rank 1 is silent"), "weight sync", "the rank that the message names", "now 7 s"),
        (TimeoutError("slow"), "generation", "the engine 'vllm'", "--engine_timeout (now 9 s)"),
        (NotBuiltError("no class for it"), "engine", "the engine 'vllm'", "an --engine_type other than vllm"),
        (
            WeightSyncError("lost"),
            "weight sync",
            "the weight sync from 'fsdp' to 'vllm'",
            "do not train with this engine",
        ),
        (OSError("no config.json"), "model", "the model's folder", "--pretrain must be"),
        (OSError("no space left on device"), "training", "the training backend 'fsdp'", "the traceback"),
        (ValueError("unrecognized model"), "model", "the model's folder", "--pretrain must be"),
        (ImportError("no nccl", name="nccl"), "training", "the installation", "nccl"),
        (ZeroDivisionError(), "sleep", "the engine 'vllm', its sleep and wake", "the traceback"),
    ],
)
def test_an_error_becomes_a_layer_and_a_cure(error: Exception, check: str, layer: str, cure: str) -> None:
    told = diagnose(error, check, CONFIG)
    assert told[0] == layer
    assert cure in told[1]
