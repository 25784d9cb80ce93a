"""One tensor cut along axis 0 over some ranks: which rows are mine, and how the rows of all become whole again.

FSDP2 cuts every parameter into ``ceil(rows / ranks)`` rows a rank; the last ranks may hold fewer, or none. Rows padded
to that size, in rank order, are the whole tensor followed by padding: so one all-gather writes it contiguously.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one tensor is cut.

    :param shape: the whole tensor's. :param ranks: how many share it. :param index: this rank's place among them.
    :param group: those ranks.
    """

    shape: torch.Size
    ranks: int
    index: int
    group: dist.ProcessGroup | None = None

    @property
    def rows(self) -> int:
        """Rows a rank holds, padding included."""
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
    """How a parameter is cut; None for one that this rank holds whole."""
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
    # to_local() is an autograd function: 80 times slower, which a step over hundreds of parameters would feel.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Wrap this rank's ``rows`` as a tensor that is cut as ``parameter`` is. No communication."""
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=torch.empty(parameter.shape, device="meta").stride(),
    )


def start_all_gather(slot: torch.Tensor, cut: Cut, tag: int = 0) -> list[Any]:
    """Begin to fill ``slot`` (flat) from its equal parts, of which each rank of ``cut.group`` has written its own.

    :param tag: tells apart those that are under way together.
    :return: what to wait for.
    """
    parts = slot.chunk(cut.ranks)
    if slot.device.type != "cpu":
        return [dist.all_gather_single(slot, parts[cut.index], group=cut.group, async_op=True)]
    # gloo's all-gather goes through a second copy of everything; sending to each other directly does not, and is two to
    # four times as fast.
    others = [rank for rank in range(cut.ranks) if rank != cut.index]
    work: list[Any] = [dist.irecv(parts[rank], group=cut.group, group_src=rank, tag=tag) for rank in others]
    work += [dist.isend(parts[cut.index], group=cut.group, group_dst=rank, tag=tag) for rank in others]
    # What two ranks send each other waits as long as the group was first told; the deadline may be shorter by now.
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
    """Begin to gather a whole tensor into ``slot`` (flat, ``[cut.padded_numel]``), where it will lie contiguously.

    Rows are cast to the slot's dtype on their way into it, before they travel, and the collective works in place:
    nothing else is allocated. Every rank of ``cut.group`` must call.

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
        """Begin to gather; see :func:`start_gather`."""
        mine, offset = self._by_rank[self._cuts[0].index], 0
        for part, cut in zip(rows, self._cuts, strict=True):
            mine[offset : offset + part.numel()].copy_(part.detach().reshape(-1))
            offset += cut.rows * cut.row_numel
        return start_all_gather(self._staging, self._cuts[0], tag)

    def sort(self, slots: Sequence[torch.Tensor]) -> None:
        """Once all has come: put each tensor together in its slot."""
        offset = 0
        for slot, cut in zip(slots, self._cuts, strict=True):
            each = cut.rows * cut.row_numel
            slot.view(cut.ranks, each).copy_(self._by_rank[:, offset : offset + each])
            offset += each


def wait(work: Iterable[Any]) -> None:
    """Wait for everything that was begun."""
    for item in work:
        item.wait()


def whole(tensor: torch.Tensor, rows: torch.Tensor | None = None, device: Any = None) -> torch.Tensor:
    """A whole tensor from all its ranks, freshly allocated.

    :param rows: gather these, cut as ``tensor`` is (an optimizer's moment), in place of its own.
    :param device: where the collective works; default: where the rows are.
    """
    rows, cut = local(tensor) if rows is None else rows, cut_of(tensor)
    if cut is None:
        return rows.detach().clone()
    slot = torch.empty(cut.padded_numel, dtype=rows.dtype, device=rows.device if device is None else device)
    wait(start_gather(slot, rows, cut))
    return slot[: cut.shape.numel()].view(cut.shape)


def take_rows(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """This rank's rows of ``value``, which is whole, cut as ``tensor`` is."""
    cut = cut_of(tensor)
    return value if cut is None else value[cut.mine]
