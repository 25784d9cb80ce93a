"""The interface of rewards: a function of prompts, responses and labels, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightrft.strategy.errors import LightRFTError


class RewardError(LightRFTError, ValueError):
    """A reward raised, was late, or returned something that is not one finite number for each sample.

    :ivar sample: index of the sample at fault within the batch, if it is known.
    """

    def __init__(self, message: str, *, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


class RewardTimeoutError(RewardError, TimeoutError):
    """A reward call did not return before its deadline."""


@dataclasses.dataclass(slots=True)
class RewardOutput:
    """One reward for each sample, and further numbers to log.

    :param rewards: one finite float for each sample, in the order of the samples.
    :param metrics: name → one finite float for each sample (a part of a combined reward, a judge's sub-score).
    """

    rewards: Sequence[float]
    metrics: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@runtime_checkable
class RewardFunction(Protocol):
    """A reward: three parallel sequences in, one number for each sample out.

    ``responses`` are without their prompts. Further per-sample values (``images``, ``finish_reasons``,
    ``response_lengths``, ...) are passed as keywords to a function that takes them by name or as ``**extras``.
    """

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
    ) -> Sequence[float] | RewardOutput: ...


def excerpt(text: str, limit: int = 80) -> str:
    """A prompt or response short enough for an error message, on one line and quoted."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
