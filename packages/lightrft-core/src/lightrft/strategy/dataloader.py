"""A data loader whose order depends on seed and epoch, whose shards depend on the rank, and that resumes exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader


class ResumableSampler(Sampler[int]):
    """Indices of one data rank. Rank ``r`` of ``w`` takes every ``w``-th of a permutation that all ranks share, so that
    the samples of a global batch do not depend on how many ranks share it.

    Its state is the epoch and the number of samples consumed *by all ranks*, so that it can be used with another world
    size.

    :param drop_last: drop samples at the end so that all ranks have equally many; False repeats some from the start
        instead.
    """

    def __init__(
        self,
        data: Sized,
        *,
        rank: int,
        world_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        consumed_samples: int = 0,
    ) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        per_epoch = self._whole_length()
        self.epoch = consumed_samples // per_epoch if per_epoch else 0
        self.consumed = consumed_samples % per_epoch if per_epoch else 0

    def set_epoch(self, epoch: int, consumed_samples: int = 0) -> None:
        """Start ``epoch``, skipping the samples of it that all ranks together have consumed."""
        self.epoch, self.consumed = epoch, consumed_samples

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.consumed = state["epoch"], state["consumed"]

    def __len__(self) -> int:
        """Samples that this rank still draws in this epoch."""
        return (self._whole_length() - self.consumed) // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        while self.consumed + self.world_size <= len(order):
            index = order[self.consumed + self.rank]
            self.consumed += self.world_size
            yield index
        self.epoch, self.consumed = self.epoch + 1, 0

    def _whole_length(self) -> int:
        rest = len(self.data) % self.world_size
        return len(self.data) - rest if self.drop_last or not rest else len(self.data) + self.world_size - rest

    def _order(self) -> list[int]:
        count = len(self.data)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(count, generator=generator).tolist()
        else:
            order = list(range(count))
        whole = self._whole_length()
        return (order * (whole // max(count, 1) + 1))[:whole]


def make_dataloader(
    data: Any,
    *,
    batch_size: int,
    pin_memory: bool,
    shuffle: bool,
    collate_fn: Callable[[list[Any]], Any] | None,
    drop_last: bool,
    sampler: Any,
    consumed_samples: int,
    seed: int,
    rank: int,
    world_size: int,
) -> StatefulDataLoader[Any]:
    """See :meth:`StrategyBase.setup_dataloader`."""
    if sampler is None:
        sampler = ResumableSampler(
            data,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            consumed_samples=consumed_samples,
        )
    elif consumed_samples:
        raise ValueError(
            "setup_dataloader: consumed_samples works only with the strategy's own sampler; set the position of yours"
        )
    with warnings.catch_warnings():  # torchdata calls an old name of torch's
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
        return StatefulDataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            # Each start of an iteration draws a seed; torch's own random state, which a checkpoint holds, stays.
            generator=torch.Generator().manual_seed(seed),
        )
