"""Which ranks belong together: a pure function of sizes, and the process groups made from it.

Ranks that share a sequence (sequence-parallel) or an engine (tensor-parallel) are neighbours: with 8 ranks and
``engine_tp_size`` 4, ranks 0-3 gather to 0 and ranks 4-7 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch.distributed as dist

from .config_checks import indivisible
from .errors import ConfigError


def blocks(world_size: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Divide the ranks into neighbouring groups of ``size``: ``blocks(4, 2) == ((0, 1), (2, 3))``."""
    return tuple(tuple(range(start, start + size)) for start in range(0, world_size, size))


def strides(world_size: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Ranks with the same place in their block: ``strides(4, 2) == ((0, 2), (1, 3))``."""
    return tuple(tuple(range(start, world_size, size)) for start in range(size))


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """The groups of a run.

    :param world_size: all ranks.
    :param engine_tp_size: ranks of one engine. :param sp_size: ranks of one sequence.
    :raises ConfigError: a size does not divide the world size.
    """

    world_size: int = 1
    engine_tp_size: int = 1
    sp_size: int = 1

    def __post_init__(self) -> None:
        sizes = {"engine_tp_size": self.engine_tp_size, "sp_size": self.sp_size}
        problems = [indivisible(name, size, self.world_size) for name, size in sizes.items()]
        if any(problems):
            raise ConfigError([problem for problem in problems if problem])

    @property
    def engine_groups(self) -> tuple[tuple[int, ...], ...]:
        return blocks(self.world_size, self.engine_tp_size)

    @property
    def sequence_groups(self) -> tuple[tuple[int, ...], ...]:
        return blocks(self.world_size, self.sp_size)

    @property
    def data_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold different data: one of each sequence group."""
        return strides(self.world_size, self.sp_size)

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.sp_size

    def data_parallel_rank(self, rank: int) -> int:
        return rank // self.sp_size

    def engine_group(self, rank: int) -> tuple[int, ...]:
        return self.engine_groups[rank // self.engine_tp_size]

    def engine_leader(self, rank: int) -> int:
        """The rank to which ``rank`` sends its prompts."""
        return self.engine_group(rank)[0]

    def shard_groups(self, shard_size: int) -> tuple[tuple[int, ...], ...]:
        """Groups over which a frozen model is sharded: the largest size up to ``shard_size`` that divides the world."""
        return blocks(self.world_size, self.shard_size(shard_size))

    def shard_size(self, wanted: int | None) -> int:
        """``wanted`` ranks, or fewer if the world has fewer or is not a multiple; None means all."""
        limit = self.world_size if wanted is None else max(1, min(wanted, self.world_size))
        return max(size for size in range(1, limit + 1) if self.world_size % size == 0)


class ProcessGroups:
    """torch process groups of a layout, made on first use and by all ranks together."""

    def __init__(self, layout: RankLayout, rank: int, timeout: timedelta | None = None) -> None:
        self.layout, self.rank, self.timeout = layout, rank, timeout

    @cached_property
    def engine(self) -> dist.ProcessGroup | None:
        return self._mine(self.layout.engine_groups)

    @cached_property
    def sequence(self) -> dist.ProcessGroup | None:
        return self._mine(self.layout.sequence_groups)

    @cached_property
    def data(self) -> dist.ProcessGroup | None:
        return self._mine(self.layout.data_groups)

    def _mine(self, groups: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup | None:
        """This rank's group; None if there is no process group, or if the rank is alone in it."""
        if not dist.is_initialized() or len(groups[0]) == 1:
            return None
        if len(groups) == 1:
            return dist.group.WORLD
        mine: Any = dist.new_subgroups_by_enumeration([list(group) for group in groups], timeout=self.timeout)[0]
        return mine
