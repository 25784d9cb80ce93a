"""Rows of a tensor over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from lightrft.fsdp.shards import Cut, Pack, cut_of, like, local, start_gather, take_rows, wait, whole
from lightrft.strategy import StrategyConfig, get_strategy


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_ranks_rows_are_those_of_torch_chunk(rows: int, ranks: int) -> None:
    tensor = torch.arange(rows * 2.0).view(rows, 2)
    chunks = list(tensor.chunk(ranks))
    for index in range(ranks):
        cut = Cut(shape=tensor.shape, ranks=ranks, index=index)
        expected = chunks[index] if index < len(chunks) else tensor[:0]
        assert torch.equal(tensor[cut.mine], expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
def test_padded_rows_in_rank_order_begin_with_the_whole_tensor(rows: int) -> None:
    tensor, ranks = torch.arange(rows * 2.0).view(rows, 2), 4
    padded = torch.zeros(0)
    for index in range(ranks):
        cut = Cut(shape=tensor.shape, ranks=ranks, index=index)
        mine = torch.zeros(cut.rows * cut.row_numel)
        mine[: tensor[cut.mine].numel()] = tensor[cut.mine].flatten()
        padded = torch.cat([padded, mine])
    assert padded.numel() == Cut(shape=tensor.shape, ranks=ranks, index=0).padded_numel
    assert torch.equal(padded[: tensor.numel()].view_as(tensor), tensor)


def test_a_plain_tensor_is_not_cut() -> None:
    tensor = torch.ones(3)
    assert cut_of(tensor) is None
    assert local(tensor) is tensor
    assert take_rows(tensor, tensor) is tensor
    assert torch.equal(whole(tensor), tensor)


def gather_every_shape() -> None:
    get_strategy(StrategyConfig(fsdp=True, dist_timeout=60)).setup_distributed()
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(1,), (1, 3), (2, 2), (3,), (5, 2, 3), (8, 4)]
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    expected = [parameter.detach().clone() for parameter in module]
    fully_shard(module, mesh=mesh)
    parameters = list(module.parameters())
    accelerators = DeviceMesh("cuda", [0, 1], _init_backend=False)
    for parameter, value in zip(parameters, expected, strict=True):
        cut = cut_of(parameter)
        assert cut is not None
        assert torch.equal(local(parameter), value[cut.mine])
        assert torch.equal(whole(parameter), value)
        assert torch.equal(whole(parameter, local(parameter) * 2), value * 2)
        half = torch.empty(cut.padded_numel, dtype=torch.bfloat16)
        wait(start_gather(half, local(parameter), cut))
        assert torch.equal(half[: value.numel()].view_as(value), value.bfloat16()), "cast on the way"
        wrapped: Any = like(parameter, local(parameter).clone())
        assert wrapped.shape == value.shape
        assert torch.equal(wrapped.full_tensor(), value)
        # Under --fsdp_cpu_offload the mesh is of accelerators, and what is sharded over it stays on the host.
        mine = local(parameter).detach()
        meta = TensorMeta(parameter.shape, parameter.stride(), mine.dtype)
        offloaded: Any = DTensor(mine, DTensorSpec(accelerators, (Shard(0),), tensor_meta=meta), requires_grad=True)
        rounded = mine.bfloat16()
        wrapped = like(offloaded, rounded)
        assert local(wrapped) is rounded and wrapped.dtype == torch.bfloat16 and wrapped.device.type == "cpu"
        assert (wrapped.shape, wrapped.device_mesh, wrapped.placements) == (value.shape, accelerators, (Shard(0),))
    cuts = [cut for parameter in parameters if (cut := cut_of(parameter)) is not None]
    slots = [torch.full((cut.padded_numel,), torch.nan) for cut in cuts]
    staging = torch.empty(sum(cut.padded_numel for cut in cuts))
    pack = Pack(staging, cuts)
    wait(pack.start([local(parameter) for parameter in parameters]))
    pack.sort(slots)
    for slot, value in zip(slots, expected, strict=True):
        assert torch.equal(slot[: value.numel()].view_as(value), value)


def under_way_together() -> None:
    strategy = get_strategy(StrategyConfig(fsdp=True, dist_timeout=60))
    strategy.setup_distributed()
    mesh = init_device_mesh("cpu", (2,))
    cuts = [
        Cut(shape=torch.Size((rows, 3)), ranks=2, index=strategy.rank, group=mesh.get_group())
        for rows in range(2, 30, 2)
    ]
    wholes = [torch.arange(cut.padded_numel, dtype=torch.float32).view(cut.shape) + 100 * cut.rows for cut in cuts]
    slots = [torch.empty(cut.padded_numel) for cut in cuts]
    work = [
        start_gather(slot, value[cut.mine], cut, tag)
        for tag, (slot, value, cut) in enumerate(zip(slots, wholes, cuts, strict=True))
    ]
    for item in reversed(work):  # in any order
        wait(item)
    for slot, value in zip(slots, wholes, strict=True):
        assert torch.equal(slot.view_as(value), value)


def test_collectives_that_are_under_way_together_are_told_apart(ranks: Any) -> None:
    ranks.run(under_way_together)


def test_gathering_makes_every_shape_whole(ranks: Any) -> None:
    ranks.run(gather_every_shape)
