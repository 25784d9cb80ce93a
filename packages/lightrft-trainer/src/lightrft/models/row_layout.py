"""Where the tokens of a batch lie in what the model sees: packed into one row, and cut over the ranks of a sequence."""

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

    :param group: their process group, in which this rank has the place ``rank`` of ``size``.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> SequenceRanks | None:
        """From a process group; None where there is none, or where this rank is alone in it."""
        if group is None or dist.get_world_size(group) == 1:
            return None
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceRanks:
        """A process group cannot be copied: the copy of a model talks to the same ranks."""
        return self

    def __copy__(self) -> SequenceRanks:
        return self


class Tally:
    """A count that all copies of a layout share: FSDP copies dataclasses and containers that it hands to a layer."""

    def __init__(self) -> None:
        self.total = 0


@dataclass(frozen=True, eq=False)
class RowLayout:
    """How rows ``[B, T]``, padded on the right, become rows ``[R, L]`` of the model on this rank.

    Packed, the rows' tokens stand one after the other in a single row without padding. With ``ranks`` each rank has an
    equal part of every row; what is missing to a multiple of the ranks is filled up at the end.

    :param mask: ``[B, T]``, true at tokens. :param lengths: tokens of each row; None where rows are not packed.
    :param attended: how often layers have gone by it.
    """

    mask: Tensor
    lengths: tuple[int, ...] | None
    ranks: SequenceRanks | None
    attended: Tally = field(default_factory=Tally, repr=False)

    @classmethod
    def of(cls, attention_mask: Tensor, *, packed: bool, ranks: SequenceRanks | None) -> RowLayout:
        """The layout of a batch; rows without a single token stay as they are."""
        mask = attention_mask.bool()
        lengths = tuple(mask.sum(dim=1).tolist()) if packed else None
        return cls(mask, lengths if lengths and any(lengths) else None, ranks)

    @cached_property
    def columns(self) -> int:
        """Tokens of a whole row, the filling left out."""
        return self.mask.shape[1] if self.lengths is None else sum(self.lengths)

    @cached_property
    def filling(self) -> int:
        """Columns that fill a row up to a multiple of the ranks."""
        return 0 if self.ranks is None else -self.columns % self.ranks.size

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the parts of a whole row that may not see each other; they add up to the row."""
        if self.lengths is None:
            return (self.columns + self.filling,)
        return tuple(length for length in (*self.lengths, self.filling) if length)

    def place(self, values: Tensor) -> Tensor:
        """``[..., B, T]`` figures of tokens, as this rank's ``[..., R, L]``."""
        if self.lengths is not None:
            values = values[..., self.mask].unsqueeze(-2)
        if self.ranks is None:
            return values
        values = nn.functional.pad(values, (0, self.filling))
        return values.chunk(self.ranks.size, dim=-1)[self.ranks.rank]

    def restore(self, values: Tensor) -> Tensor:
        """This rank's ``[R, L]`` figures as ``[B, T]`` on every rank of the sequence, with gradient."""
        if self.ranks is not None:
            values = _GatherColumns.apply(values, self.ranks)[:, : self.columns]
        if self.lengths is None:
            return values
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask, values)


class _GatherColumns(torch.autograd.Function):
    """``[R, L]`` of each rank side by side. Every rank computes the same loss of them.

    Each rank's gradient is then that of its own columns, and backends average gradients over all ranks: so that the
    average is the whole gradient, each rank's part counts as often as there are parts.
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
