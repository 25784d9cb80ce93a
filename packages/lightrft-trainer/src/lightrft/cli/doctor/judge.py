"""The limits that measurements are judged by. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .findings import Status

# Mean distance of engine and trainer logprobs, by the dtype that both compute in. Measured: 1e-6 in fp32, 1e-2 in bf16
# on weights of a small model; a single stale or misplaced matrix shows as 0.1 and more.
DRIFT_LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.05}


def drift_problem(mean: float, largest: float, dtype: str) -> str | None:
    """What is wrong with a drift, or None."""
    if mean != mean or largest != largest:
        return "a logprob is NaN"
    limit = DRIFT_LIMITS[dtype]
    return None if mean <= limit else f"a mean of {mean:.2g} is above {limit:g}, the limit in {dtype}"


def growth_problem(before: float, after: float, dtype: str) -> str | None:
    """What is wrong if the drift grows although the learning rate is 0, or None."""
    floor = DRIFT_LIMITS[dtype] / 10
    if after <= max(2 * before, floor):
        return None
    return f"the mean drift grew from {before:.2g} to {after:.2g} over a step with learning rate 0"


def repeated(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], dtype: str) -> tuple[Status, int]:
    """Whether greedy answers are the same. In 16 bits a few may flip at ties; in fp32 none may.

    :return: status, and how many are equal.
    """
    equal = sum(list(one) == list(other) for one, other in zip(before, after, strict=True))
    if equal == len(before):
        return "ok", equal
    return ("failed" if dtype == "float32" or 2 * equal < len(before) else "warning"), equal
