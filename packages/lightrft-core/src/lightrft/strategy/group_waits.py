"""Timeouts of torch's process groups, including those that libraries make, and the number of their collectives."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass
class GroupDeadline:
    """One timeout for every process group: those that libraries make would wait half an hour."""

    seconds: float
    _seen: tuple[int, int] = (0, 0)

    def impose(self) -> None:
        """Set it on every group, if there are new ones since the last call."""
        groups = dist.distributed_c10d._world.pg_map
        newest = len(groups), id(next(reversed(groups), None))
        if newest == self._seen:
            return
        self._seen = newest
        for group in list(groups):
            if isinstance(group, dist.ProcessGroup):
                group.set_timeout(timedelta(seconds=self.seconds))


def default_patience(seconds: timedelta, nccl: timedelta | None = None) -> tuple[timedelta, Any]:
    """Set torch's default timeout for making a group; returns the former one.

    torch has no setting for it; gloo's default is half an hour.
    """
    c10d: Any = dist.distributed_c10d
    before = c10d.default_pg_timeout, c10d.default_pg_nccl_timeout
    c10d.default_pg_timeout = seconds
    if before[1] is not None:  # None where torch has no NCCL
        c10d.default_pg_nccl_timeout = nccl or seconds
    return before


def collectives_started() -> dict[str, int]:
    """Number of collectives that this rank has started in each of its process groups."""
    started = {}
    groups = [group for group in list(dist.distributed_c10d._world.pg_map) if isinstance(group, dist.ProcessGroup)]
    for group in groups:
        counter: Any = group
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            started[group.group_name] = counter._get_sequence_number_for_group()
    return started
