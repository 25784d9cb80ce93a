"""The gradient norm over sharded, replicated and plain gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightrft.fsdp.gradients import global_norm, widen
from lightrft.fsdp.shards import like, local
from lightrft.strategy import StrategyConfig, get_strategy

CPU = torch.device("cpu")


def test_no_gradient_has_norm_zero() -> None:
    assert global_norm([], CPU) == 0


def test_sixteen_bit_gradients_are_squared_in_fp32() -> None:
    gradients = [torch.full((1000,), 300.0, dtype=torch.float16)]  # its square overflows fp16
    assert global_norm(gradients, CPU).item() == pytest.approx(300 * math.sqrt(1000), rel=1e-6)


def mixed_meshes() -> float:
    strategy = get_strategy(StrategyConfig(fsdp=True, dist_timeout=60))
    strategy.setup_distributed()
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((5, 3), (1,), (4, 4), (6,))]
    sharded = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros_like(value)) for value in values[:2]])
    replicated = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros_like(values[2]))])
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(replicated, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    gradients: list[Any] = []
    for parameter, value in zip((*sharded, *replicated), values[:3], strict=True):
        rows = value.chunk(2)[strategy.rank] if strategy.rank < len(value.chunk(2)) else value[:0]
        gradients.append(like(parameter, (rows if parameter in set(sharded) else value).clone()))
    gradients.append(values[3])
    norm = global_norm(gradients, CPU).item()
    expected = torch.cat([value.flatten() for value in values]).norm().item()
    assert norm == pytest.approx(expected, rel=1e-6)
    return norm


def test_the_norm_counts_every_element_once_and_is_the_same_on_all_ranks(ranks: Any) -> None:
    first, second = ranks.run(mixed_meshes)
    assert first == second


def test_widened_gradients_are_fp32_and_the_others_stay() -> None:
    half, full = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(2))
    half.grad_dtype = None  # type: ignore[attr-defined]
    half.grad, full.grad = torch.ones_like(half), torch.ones_like(full)
    kept = full.grad
    widen([half, full])
    assert half.grad is not None
    assert local(half.grad).dtype == torch.float32
    assert full.grad is kept
