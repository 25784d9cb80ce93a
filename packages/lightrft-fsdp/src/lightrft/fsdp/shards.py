"""A tensor sharded along axis 0 over some ranks: which rows this rank has, and how to gather the whole.

FSDP2 gives each rank ``ceil(rows / ranks)`` rows of every parameter; the last ranks may have fewer, or none. Rows
padded to that size, in rank order, are the whole tensor followed by padding: so one all-gather writes it contiguously.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one tensor is sharded.

    :param shape: the whole tensor's. :param ranks: how many share it. :param index: this rank's place among them.
    :param group: those ranks.
    """

    shape: torch.Size
    ranks: int
    index: int
    group: dist.ProcessGroup | None = None

    @property
    def rows(self) -> int:
        """Rows per rank, padding included."""
        return -(-self.shape[0] // self.ranks)

    @property
    def mine(self) -> slice:
        """This rank's rows of the whole tensor."""
        start = min(self.index * self.rows, self.shape[0])
        return slice(start, min(start + self.rows, self.shape[0]))

    @property
    def row_numel(self) -> int:
        return self.shape[1:].numel()

    @property
    def padded_numel(self) -> int:
        """Elements of the whole tensor with every rank's padding."""
        return self.ranks * self.rows * self.row_numel


def cut_of(tensor: torch.Tensor) -> Cut | None:
    """How a parameter is sharded; None for one that is whole on this rank."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard) and mesh.size(axis) > 1:
            assert placement.dim == 0, "only axis 0 is ever cut"
            return Cut(
                shape=tensor.shape, ranks=mesh.size(axis), index=mesh.get_local_rank(axis), group=mesh.get_group(axis)
            )
    assert all(isinstance(p, (Shard, Replicate)) for p in tensor.placements)
    return None


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows, sharing their memory."""
    # to_local() is an autograd function and 80 times slower, which matters in a step over hundreds of parameters.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Wrap this rank's ``rows`` as a tensor that is sharded like ``parameter``. No communication, no copy."""
    if not isinstance(parameter, DTensor):
        return rows
    # DTensor.from_local would move rows on the host to the mesh's device.
    meta = TensorMeta(parameter.shape, parameter.stride(), rows.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
    return DTensor(rows, spec, requires_grad=False)


def start_all_gather(slot: torch.Tensor, cut: Cut, tag: int = 0) -> list[Any]:
    """Start to fill ``slot`` (flat) from its equal parts, of which each rank of ``cut.group`` has written its own.

    :param tag: distinguishes concurrent ones.
    :return: what to wait for.
    """
    parts = slot.chunk(cut.ranks)
    if slot.device.type != "cpu":
        return [dist.all_gather_single(slot, parts[cut.index], group=cut.group, async_op=True)]
    # gloo's all-gather makes a second copy of everything; direct sends do not, and are two to four times as fast.
    others = [rank for rank in range(cut.ranks) if rank != cut.index]
    work: list[Any] = [dist.irecv(parts[rank], group=cut.group, group_src=rank, tag=tag) for rank in others]
    work += [dist.isend(parts[cut.index], group=cut.group, group_dst=rank, tag=tag) for rank in others]
    # Direct sends have the timeout with which the group was made; the deadline may be shorter.
    group: Any = dist.group.WORLD if cut.group is None else cut.group
    timeout = group._get_backend(slot.device).options._timeout
    return [_Bounded(item, timeout) for item in work]


@dataclass(frozen=True)
class _Bounded:
    """Work that is waited for up to ``timeout``."""

    work: Any
    timeout: timedelta

    def wait(self) -> None:
        self.work.wait(self.timeout)


def start_gather(slot: torch.Tensor, rows: torch.Tensor, cut: Cut, tag: int = 0) -> list[Any]:
    """Start to gather a whole tensor into ``slot`` (flat, ``[cut.padded_numel]``), where it will be contiguous.

    Rows are cast to the slot's dtype as they are copied into it, before they are sent, and the collective works in
    place: nothing else is allocated. Every rank of ``cut.group`` must call.

    :return: what to wait for.
    """
    each = cut.rows * cut.row_numel
    slot[cut.index * each :][: rows.numel()].copy_(rows.detach().reshape(-1))
    return start_all_gather(slot, cut, tag)


class Pack:
    """Several small tensors in one collective, through ``staging`` (flat, the sum of their padded sizes)."""

    def __init__(self, staging: torch.Tensor, cuts: Sequence[Cut]) -> None:
        self._by_rank, self._staging, self._cuts = staging.view(cuts[0].ranks, -1), staging, cuts

    def start(self, rows: Sequence[torch.Tensor], tag: int = 0) -> list[Any]:
        """Start to gather; see :func:`start_gather`."""
        mine, offset = self._by_rank[self._cuts[0].index], 0
        for part, cut in zip(rows, self._cuts, strict=True):
            mine[offset : offset + part.numel()].copy_(part.detach().reshape(-1))
            offset += cut.rows * cut.row_numel
        return start_all_gather(self._staging, self._cuts[0], tag)

    def sort(self, slots: Sequence[torch.Tensor]) -> None:
        """When all parts have arrived: assemble each tensor in its slot."""
        offset = 0
        for slot, cut in zip(slots, self._cuts, strict=True):
            each = cut.rows * cut.row_numel
            slot.view(cut.ranks, each).copy_(self._by_rank[:, offset : offset + each])
            offset += each


def wait(work: Iterable[Any]) -> None:
    """Wait for everything that was started."""
    for item in work:
        item.wait()


def whole(tensor: torch.Tensor, rows: torch.Tensor | None = None, device: Any = None) -> torch.Tensor:
    """A whole tensor from all its ranks, freshly allocated.

    :param rows: gather these, sharded like ``tensor`` (an optimizer's moment), instead of its own.
    :param device: where the collective works; default: where the rows are.
    """
    rows, cut = local(tensor) if rows is None else rows, cut_of(tensor)
    if cut is None:
        return rows.detach().clone()
    slot = torch.empty(cut.padded_numel, dtype=rows.dtype, device=rows.device if device is None else device)
    wait(start_gather(slot, rows, cut))
    return slot[: cut.shape.numel()].view(cut.shape)


def take_rows(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the whole ``value``, sharded like ``tensor``."""
    cut = cut_of(tensor)
    return value if cut is None else value[cut.mine]
