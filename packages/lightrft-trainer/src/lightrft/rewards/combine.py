"""Several rewards as one weighted sum, each still visible in the metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .checked import CheckedReward
from .protocol import RewardError, RewardOutput


class CombinedReward:
    """The weighted sum of several rewards.

    :param parts: rewards under different names, each with its weight (any finite number but 0).
    :raises ValueError: no parts, a name twice, or a weight that is 0 or not finite.
    """

    def __init__(self, parts: Sequence[tuple[CheckedReward, float]]) -> None:
        if not parts:
            raise ValueError("a combined reward needs at least one part")
        names = [part.name for part, _ in parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"reward {', '.join(twice)} appears more than once; give it once with the sum of its weights"
            )
        for part, weight in parts:
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"reward {part.name}={weight}: a weight is a finite number other than 0")
        self.parts = tuple(parts)
        self.name = "+".join(names)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
    ) -> RewardOutput:
        """Rewards of one batch; with several parts, ``metrics`` holds each part's unweighted rewards under its name.

        :raises RewardError: from the part at fault, or if the sum is too large for a float.
        """
        total = [0.0] * len(responses)
        metrics: dict[str, Sequence[float]] = {}
        for part, weight in self.parts:
            output = part(prompts, responses, labels, **extras)
            total = [sum_ + weight * reward for sum_, reward in zip(total, output.rewards, strict=True)]
            if len(self.parts) == 1:
                metrics.update(output.metrics)
            else:
                metrics[part.name] = list(output.rewards)
                metrics.update({f"{part.name}/{key}": values for key, values in output.metrics.items()})
        for index, value in enumerate(total):
            if not math.isfinite(value):
                raise RewardError(f"reward {self.name}: the weighted sum for sample {index} is {value}", sample=index)
        return RewardOutput(rewards=total, metrics=metrics)
