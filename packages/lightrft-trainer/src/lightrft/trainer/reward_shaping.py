"""From rewards to shaped rewards: overlong penalty, running norm, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightrft.rewards import soft_overlong_penalty

from .advantages import SumOverRanks


class RunningMoments:
    """Mean and variance of all values so far (Chan, Golub and LeVeque, 1979), over all ranks.

    All data ranks must call :meth:`update` together; all then have the same state.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.squares = 0.0

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 while it is unknown or 0."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def update(self, values: Tensor, sum_over_ranks: SumOverRanks | None = None) -> None:
        """Add this rank's values (any shape). A collective if ``sum_over_ranks`` is one."""
        reduce = sum_over_ranks or (lambda vector: vector)
        exact = values.double().flatten()
        total = reduce(torch.stack([exact.sum(), exact.new_tensor(float(exact.numel()))]))
        count = float(total[1])
        if count == 0:
            return
        mean = float(total[0]) / count
        squares = float(reduce((exact - mean).square().sum().reshape(1))[0])
        shift = mean - self.mean
        whole = self.count + count
        self.squares += squares + shift * shift * self.count * count / whole
        self.mean += shift * count / whole
        self.count = whole

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON numbers."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self.count, self.mean, self.squares = (float(state[key]) for key in ("count", "mean", "squares"))


@dataclass(frozen=True, kw_only=True)
class RewardShaping:
    """The settings, applied in this order: overlong penalty, running norm, clip.

    :param clip: largest absolute value of a reward; 0: no clipping.
    :param running_norm: divide by the running standard deviation; ``minus_mean``: subtract the running mean first.
    :param overlong: add the overlong penalty, times its factor (:func:`lightrft.rewards.soft_overlong_penalty`).
    """

    clip: float = 0.0
    running_norm: bool = False
    minus_mean: bool = False
    overlong: bool = False
    overlong_buffer_len: int = 1024
    overlong_penalty_factor: float = 1.0
    max_length: int = 1024

    def apply(
        self, rewards: Tensor, lengths: Tensor, moments: RunningMoments, sum_over_ranks: SumOverRanks | None = None
    ) -> Tensor:
        """Shaped rewards ``[B]``; ``moments`` is updated with these rewards first. A collective where
        ``sum_over_ranks`` is one.
        """
        shaped = rewards.float()
        if self.overlong:
            limits = {"max_length": self.max_length, "buffer_length": self.overlong_buffer_len}
            penalties = [soft_overlong_penalty(int(length), **limits) for length in lengths.tolist()]
            shaped = shaped + self.overlong_penalty_factor * shaped.new_tensor(penalties)
        if self.running_norm:
            moments.update(shaped, sum_over_ranks)
            shaped = (shaped - moments.mean if self.minus_mean else shaped) / moments.std
        return shaped.clamp(-self.clip, self.clip) if self.clip > 0 else shaped
