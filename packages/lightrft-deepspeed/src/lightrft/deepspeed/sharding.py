"""Sharding ZeRO-3 models: over fewer ranks than all, and models that were built on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.strategy.meta_init import FillPlan, initialise, materialise

from .environment import load_deepspeed
from .parameters import is_sharded


def cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Hold floating-point parameters in ``dtype``; None leaves them. Parameter objects stay."""
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def shard_unfilled(
    model: nn.Module, plan: FillPlan, config: dict[str, Any], group: ShardGroup | None, dtype: Any, seed: int
) -> None:
    """Give a model on the meta device its shards, one module at a time, so that only one is whole.

    Initialised parameters have their values afterwards; those that the plan reads from files do not yet. Collective.

    :param config: DeepSpeed's, of a model that does not train. :param dtype: what to hold parameters in, or None.
    """
    ranks = None if group is None else group.get_data_parallel_group()
    secondary = None
    if config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
        from deepspeed.utils import groups

        # without it, every Init would make the group that there is already
        secondary = groups._get_zero_param_intra_parallel_group()

    def shard(parameters: Sequence[nn.Parameter]) -> None:
        own = nn.ParameterList(parameters)
        cast(own, dtype)
        if parameters:
            load_deepspeed().zero.Init(
                module=own,
                data_parallel_group=ranks,
                zero_param_parallel_group=secondary,
                config_dict_or_path=config,
            )

    def after(module: nn.Module) -> None:
        shard([p for p in module.parameters(recurse=False) if not p.is_meta and not is_sharded(p)])

    initialise(model, model, plan, seed, after)
    for parameter in model.parameters():
        if parameter.is_meta:
            materialise(nn.ParameterList([parameter]), torch.device("cpu"))
            shard([parameter])


def hold_root_weakly(model: nn.Module) -> None:
    """Let a stage-3 model be garbage-collected.

    Each ``deepspeed.initialize`` pushes the root module on a global stack, from which it is never removed (0.19.8,
    ``DeepSpeedZeRoOffload.setup_zero_stage3_hooks``). Remove this when DeepSpeed pops it.
    """
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK

    def drop(dead: Any) -> None:
        stack[:] = [module for module in stack if module is not dead]

    if any(module is model for module in stack):
        proxy = weakref.proxy(model, drop)
        stack[:] = [proxy if module is model else module for module in stack]


def forget_backward_hooks(model: nn.Module) -> None:
    """Let a new engine of the same model run backward passes.

    The first one leaves its functions on every module, which ``destroy`` does not remove and the next engine does not
    replace (0.19.8, ``DeepSpeedZeRoOffload._register_deepspeed_module``). Then an engine without a forward pass would
    gather for backward, and prefetch nothing. Remove this when ``destroy`` removes them.
    """
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)


class ShardGroup:
    """The part of a Megatron-style ``mpu`` that DeepSpeed uses: shards over neighbouring ranks."""

    def __init__(self, groups: tuple[tuple[int, ...], ...]) -> None:
        self._group: Any = dist.new_subgroups_by_enumeration([list(group) for group in groups])[0]
        self._size = len(groups[0])

    def get_data_parallel_group(self) -> Any:
        return self._group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        return self._size

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> Any:
        return None
