from __future__ import annotations

import pytest

from lightrft.deepspeed import get_ds_eval_config, get_ds_train_config
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


def test_overlap_comm_reaches_stage_2_and_is_refused_elsewhere_by_name():
    assert get_ds_train_config(StrategyConfig(overlap_comm=True))["zero_optimization"]["overlap_comm"] is True
    for stage in (1, 3):
        with pytest.raises(ConfigError, match=f"--overlap_comm with --zero_stage {stage}.*--zero_stage 2"):
            get_ds_train_config(StrategyConfig(overlap_comm=True, zero_stage=stage))
