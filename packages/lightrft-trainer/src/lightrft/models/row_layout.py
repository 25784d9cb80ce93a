"""Where a batch's tokens are in the model's input: packed into one row, and split over the ranks of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class SequenceRanks:
    """The ranks that share each row (Ulysses sequence parallelism, arXiv:2309.14509).

    :param group: their process group, in which this rank is ``rank`` of ``size``.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> SequenceRanks | None:
        """From a process group; None if there is none, or if this rank is alone in it."""
        if group is None or dist.get_world_size(group) == 1:
            return None
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceRanks:
        """A process group cannot be copied: a copy of a model uses the same one."""
        return self

    def __copy__(self) -> SequenceRanks:
        return self


class Tally:
    """A count that all copies of a layout share: FSDP copies dataclasses and containers that it passes to a layer."""

    def __init__(self) -> None:
        self.total = 0


@dataclass(frozen=True, eq=False)
class RowLayout:
    """How rows ``[B, T]``, padded on the right, become rows ``[R, L]`` of the model on this rank.

    Packed, the rows' tokens are concatenated into a single row without padding. With ``ranks`` each rank has an equal
    part of every row, which is padded at the end to a multiple of the ranks.

    :param mask: ``[B, T]``, true at tokens. :param lengths: tokens of each row; None where rows are not packed.
    :param attended: number of layers that have used it.
    """

    mask: Tensor
    lengths: tuple[int, ...] | None
    ranks: SequenceRanks | None
    attended: Tally = field(default_factory=Tally, repr=False)

    @classmethod
    def of(cls, attention_mask: Tensor, *, packed: bool, ranks: SequenceRanks | None) -> RowLayout:
        """The layout of a batch; rows without any token are kept as they are."""
        mask = attention_mask.bool()
        lengths = tuple(mask.sum(dim=1).tolist()) if packed else None
        return cls(mask, lengths if lengths and any(lengths) else None, ranks)

    @cached_property
    def columns(self) -> int:
        """Tokens of a whole row, without padding."""
        return self.mask.shape[1] if self.lengths is None else sum(self.lengths)

    @cached_property
    def filling(self) -> int:
        """Columns that pad a row to a multiple of the ranks."""
        return 0 if self.ranks is None else -self.columns % self.ranks.size

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the parts of a whole row that may not see each other; they add up to the row."""
        if self.lengths is None:
            return (self.columns + self.filling,)
        return tuple(length for length in (*self.lengths, self.filling) if length)

    def place(self, values: Tensor) -> Tensor:
        """``[..., B, T]`` values of tokens as this rank's ``[..., R, L]``."""
        if self.lengths is not None:
            values = values[..., self.mask].unsqueeze(-2)
        if self.ranks is None:
            return values
        values = nn.functional.pad(values, (0, self.filling))
        return values.chunk(self.ranks.size, dim=-1)[self.ranks.rank]

    def restore(self, values: Tensor) -> Tensor:
        """This rank's ``[R, L]`` values as ``[B, T]`` on every rank of the sequence, with gradient."""
        if self.ranks is not None:
            values = _GatherColumns.apply(values, self.ranks)[:, : self.columns]
        if self.lengths is None:
            return values
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask, values)


class _GatherColumns(torch.autograd.Function):
    """``[R, L]`` of all ranks concatenated. Every rank computes the same loss from them.

    Each rank's gradient is that of its own columns, multiplied by the number of ranks, since backends average gradients
    over all ranks: the average is then the whole gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks, ctx.columns = ranks, values.shape[1]
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(ranks.size)]
        dist.all_gather(parts, values, group=ranks.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.columns
        return gradient[:, start : start + ctx.columns] * ctx.ranks.size, None
