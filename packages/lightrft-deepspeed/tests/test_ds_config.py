from __future__ import annotations

import contextlib
import re
import warnings

import pytest
import torch

from lightrft.deepspeed import DeepspeedStrategy, get_ds_eval_config, get_ds_train_config
from lightrft.deepspeed.environment import load_deepspeed
from lightrft.strategy import ConfigError, StrategyConfig


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_that_of_the_settings(stage):
    assert get_ds_train_config(StrategyConfig(zero_stage=stage))["zero_optimization"]["stage"] == stage


def test_a_model_that_does_not_train_is_sharded_under_stage_3_alone():
    stages = [get_ds_eval_config(StrategyConfig(zero_stage=s))["zero_optimization"]["stage"] for s in (1, 2, 3)]
    assert stages == [0, 0, 3]


def test_max_norm_is_the_clipping():
    assert get_ds_train_config(StrategyConfig(max_norm=0.25))["gradient_clipping"] == 0.25
    assert get_ds_train_config(StrategyConfig(max_norm=0.0))["gradient_clipping"] == 0.0


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_one_precision_is_enabled(flag):
    config = get_ds_train_config(StrategyConfig(**{flag: True}))
    assert [name for name in ("bf16", "fp16") if config[name]["enabled"]] == [flag]


def test_gradients_accumulate_and_travel_in_fp32_unless_told_otherwise():
    config = get_ds_train_config(StrategyConfig(bf16=True))
    assert (config["data_types"]["grad_accum_dtype"], config["communication_data_type"]) == ("fp32", "fp32")
    config = get_ds_train_config(StrategyConfig(bf16=True, grad_accum_dtype="bf16"))
    assert (config["data_types"]["grad_accum_dtype"], config["communication_data_type"]) == ("bf16", "bf16")


def test_adam_offload_puts_the_optimizer_on_the_host():
    offload = get_ds_train_config(StrategyConfig(adam_offload=True))["zero_optimization"]["offload_optimizer"]
    assert offload["device"] == "cpu"


def test_zpg_is_the_secondary_shard_of_stage_3():
    assert get_ds_train_config(StrategyConfig(zero_stage=3, zpg=4))["zero_optimization"]["zero_hpz_partition_size"] == 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overlap_comm_reaches_every_stage(stage):
    config = get_ds_train_config(StrategyConfig(overlap_comm=True, zero_stage=stage))
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["managed_gradient_accumulation"] is (stage == 1), "stage 1 must know the last micro-batch beforehand"


def test_nothing_is_accumulated_behind_our_back():
    for stage in (1, 2, 3):
        assert get_ds_train_config(StrategyConfig(zero_stage=stage))["managed_gradient_accumulation"] is False


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_stage": 0}, "--zero_stage 0: must be 1, 2 or 3"),
        ({"zero_stage": 4}, "--zero_stage 4: must be 1, 2 or 3"),
        ({"bf16": True, "fp16": True}, "--bf16 with --fp16: choose one"),
        ({"zpg": 2, "zero_stage": 2}, "--zpg 2: works only with --zero_stage 3"),
        ({"grad_accum_dtype": "bf16"}, "--grad_accum_dtype bf16: works only with --bf16"),
        ({"grad_accum_dtype": "fp16", "bf16": True}, "--grad_accum_dtype fp16: must be fp32 or bf16"),
        ({"overlap_comm": True, "zero_stage": 1, "bf16": True}, "use --zero_stage 2 or --grad_accum_dtype bf16"),
        ({"mixed_mm_data": True}, "--mixed_mm_data: works only with --fsdp"),
        ({"fsdp_cpu_offload": True, "zero_stage": 3}, "--fsdp_cpu_offload: works only with --fsdp"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_at_once(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words).replace("'", ".?")):
        DeepspeedStrategy(**settings)


def test_a_secondary_shard_must_divide_the_ranks():
    with pytest.raises(ConfigError, match="--zpg 3: must divide the world size 4; possible are 1, 2, 4"):
        StrategyConfig(zero_stage=3, zpg=3, train_batch_size=4).checked(4)


def test_deepspeed_calls_old_names_of_torch_without_a_warning_a_step():
    with warnings.catch_warnings(record=True, action="always") as seen:
        load_deepspeed.__wrapped__()
        with contextlib.suppress(ValueError):  # no process group, which it says after the warning
            torch.distributed.all_gather_into_tensor(torch.zeros(1), torch.zeros(1))
    assert seen == []
