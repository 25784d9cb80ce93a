"""One tensor cut along axis 0 over some ranks: which rows are mine, and how the rows of all become whole again.

FSDP2 cuts every parameter into ``ceil(rows / ranks)`` rows a rank; the last ranks may hold fewer, or none. Rows padded
to that size, in rank order, are the whole tensor followed by padding: so one all-gather writes it contiguously.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

# torch 2.13 renames the collective.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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


def gather_into(slot: torch.Tensor, rows: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Gather a whole tensor into ``slot`` (flat, ``[cut.padded_numel]``) and view it there.

    Rows are cast to the slot's dtype on their way into it, before they travel, and the collective works in place:
    nothing else is allocated. Every rank of ``cut.group`` must call.
    """
    each = cut.rows * cut.row_numel
    mine = slot[cut.index * each : (cut.index + 1) * each]
    mine[: rows.numel()].copy_(rows.detach().reshape(-1))
    _all_gather(slot, mine, group=cut.group)
    return slot[: cut.shape.numel()].view(cut.shape)


def gather_packed(slots: list[torch.Tensor], rows: list[torch.Tensor], cuts: list[Cut], staging: torch.Tensor) -> None:
    """Gather several small tensors in one collective, through ``staging`` (flat, the sum of their padded sizes)."""
    ranks, index = cuts[0].ranks, cuts[0].index
    by_rank = staging.view(ranks, -1)
    offset = 0
    for part, cut in zip(rows, cuts, strict=True):
        by_rank[index, offset : offset + part.numel()].copy_(part.detach().reshape(-1))
        offset += cut.rows * cut.row_numel
    _all_gather(staging, by_rank[index], group=cuts[0].group)
    offset = 0
    for slot, cut in zip(slots, cuts, strict=True):
        each = cut.rows * cut.row_numel
        slot.view(ranks, each).copy_(by_rank[:, offset : offset + each])
        offset += each


def whole(tensor: torch.Tensor, rows: torch.Tensor | None = None, device: Any = None) -> torch.Tensor:
    """A whole tensor from all its ranks, freshly allocated.

    :param rows: gather these, cut as ``tensor`` is (an optimizer's moment), in place of its own.
    :param device: where the collective works; default: where the rows are.
    """
    rows, cut = local(tensor) if rows is None else rows, cut_of(tensor)
    if cut is None:
        return rows.detach().clone()
    slot = torch.empty(cut.padded_numel, dtype=rows.dtype, device=rows.device if device is None else device)
    return gather_into(slot, rows, cut)


def take_rows(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """This rank's rows of ``value``, which is whole, cut as ``tensor`` is."""
    cut = cut_of(tensor)
    return value if cut is None else value[cut.mine]
