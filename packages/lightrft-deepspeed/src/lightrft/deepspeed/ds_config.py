"""From our settings to DeepSpeed's dictionary. Pure functions."""

from __future__ import annotations

from typing import Any

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.optimizers import LossScale


def get_ds_train_config(config: StrategyConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of a trained model.

    We accumulate gradients ourselves: each backward pass adds its share of a global mean, and ``step`` is called only
    at the boundary (``managed_gradient_accumulation`` is off; see :func:`boundary_is_told` for the exception).
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlap_comm,
        "offload_optimizer": {"device": "cpu" if config.adam_offload else "none", "pin_memory": config.adam_offload},
    }
    if config.zero_stage == 3:
        zero |= {"zero_hpz_partition_size": config.zpg, "stage3_gather_16bit_weights_on_model_save": False}
    accumulate = config.grad_accum_dtype or "fp32"
    return {
        **_common(config),
        "managed_gradient_accumulation": boundary_is_told(config),
        "zero_optimization": zero,
        "gradient_clipping": config.max_norm,
        "data_types": {"grad_accum_dtype": accumulate},
        "communication_data_type": accumulate,
        # Allow any torch optimizer: DeepSpeed's compiled ones are not needed.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def boundary_is_told(config: StrategyConfig) -> bool:
    """Whether the engine must be told before a backward pass that it is the last of a step.

    Stage 1 reduces only then, and can overlap it with the pass only if it knows.
    """
    return config.zero_stage == 1 and config.overlap_comm


def get_ds_eval_config(config: StrategyConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that is not trained (yet): sharded under stage 3, whole otherwise."""
    zero: dict[str, Any] = {"stage": 3 if config.zero_stage == 3 else 0}
    if config.zero_stage == 3:
        zero["zero_hpz_partition_size"] = config.zpg
    return {**_common(config), "zero_optimization": zero}


def _common(config: StrategyConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_train_batch_size,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": config.dtype_name == "bfloat16"},
        # We scale fp16 losses ourselves, equally on every backend, before each backward pass.
        "fp16": {"enabled": config.dtype_name == "float16", "loss_scale": LossScale(enabled=True).value},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
