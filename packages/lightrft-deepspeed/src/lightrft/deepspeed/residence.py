"""Moving a ZeRO model's tensors to the host and back.

ZeRO steps on flat buffers, and parameters and moments are views of them: to free memory the buffer itself must be
moved, and its views updated. DeepSpeed's ``offload_states`` supports neither torch's AdamW on stage 3 nor stage 1 in
bf16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightrft.strategy.hub_layout import hub_sources

from .parameters import flat_partitions, link_states


def move_optimizer_states(zero: Any, device: torch.device, *, pin: bool) -> int:
    """Move this rank's moments and fp32 master weights. Returns the bytes moved.

    :param zero: the engine's ZeRO optimizer. :param pin: into pinned memory, on the way to the host.
    """
    states = [
        value
        for state in zero.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0  # a 0-d step counter stays where the optimizer put it
    ]
    nbytes = _move([*states, *flat_partitions(zero)], device, pin)
    if nbytes:
        _follow(zero)
    return nbytes


def move_parameters(model: nn.Module, zero: Any, device: torch.device, *, pin: bool) -> int:
    """Move this rank's parameters (shards, under stage 3) and buffers. Returns the bytes moved.

    :param zero: the engine's ZeRO optimizer, or None for a model that does not train.
    """
    flats = _flat_parameters(zero)
    nbytes = _move(flats, device, pin)
    if nbytes:
        _repoint_parameters(zero, flats)
        _follow(zero)
    inside = {flat.untyped_storage().data_ptr() for flat in flats}
    rest = [getattr(tensor, "ds_tensor", tensor) for _, tensor in hub_sources(model)]
    return nbytes + _move([t for t in rest if t.untyped_storage().data_ptr() not in inside], device, pin)


def is_elsewhere(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether the tensor is not on ``device`` yet."""
    return tensor.device.type != device.type


def carry(tensor: torch.Tensor, device: torch.device, pin: bool) -> torch.Tensor:
    """A copy of the tensor on ``device``."""
    moved = tensor.to(device)
    return moved.pin_memory() if pin and device.type == "cpu" else moved


@torch.no_grad()
def _move(tensors: Iterable[torch.Tensor], device: torch.device, pin: bool) -> int:
    nbytes = 0
    for tensor in tensors:
        if is_elsewhere(tensor, device):
            nbytes += tensor.nbytes
            tensor.data = carry(tensor.data, device, pin)
    return nbytes


def _flat_parameters(zero: Any) -> list[torch.Tensor]:
    """The buffers that trained parameters (their shards, under stage 3) are views of."""
    if zero is None:
        return []
    if hasattr(zero, "lp_param_buffer"):  # stage 3
        return [zero.lp_param_buffer]
    return list(zero.bit16_groups_flat if hasattr(zero, "bit16_groups_flat") else zero.bf16_groups_flat)


def _repoint_parameters(zero: Any, flats: list[torch.Tensor]) -> None:
    """Update every view of the flat parameters to their new place."""
    if hasattr(zero, "lp_param_buffer"):  # stage 3
        from deepspeed.runtime.zero.utils import get_mapping_to_flat_buffer

        for shard, start, length in get_mapping_to_flat_buffer(zero._get_parameter_partitions()):
            shard.data = zero.lp_param_buffer.narrow(0, start, length)
        zero.fp16_partitioned_groups_flat.clear()
        zero._set_fp16_partitioned_groups_flat()
        return
    for group, flat in enumerate(flats):
        if hasattr(zero, "bit16_groups_flat"):
            zero._update_model_bit16_weights(group)
            zero.parallel_partitioned_bit16_groups[group] = zero.get_data_parallel_partitions(flat, group)
        else:  # BF16_Optimizer
            zero._update_storage_to_flattened_tensor(zero.bf16_groups[group], flat)
            ranks = len(zero.bf16_partitioned_groups[group])
            zero.bf16_partitioned_groups[group] = list(flat.chunk(ranks))


def _follow(zero: Any) -> None:
    """Link each parameter to its master weights and moments again; stage 3 looks them up at each use."""
    if hasattr(zero, "_link_all_hp_params"):
        zero._link_all_hp_params()
        link_states(zero)
