"""How many prompts of each dataset make up an epoch: pure arithmetic."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from lightrft.strategy.config_checks import are_shares

from .records import TRAINING_FLAGS, DataError, DataFlags


def parse_shares(text: str | None, count: int) -> list[float] | None:
    """``"0.7,0.3"`` as shares that add up to 1, or None if none are given.

    :raises DataError: not one positive number for each of ``count`` datasets.
    """
    if text is None:
        return None
    if not are_shares(text):
        raise DataError(
            f"--prompt_data_probs {text}: must be positive numbers separated by commas, for example 0.7,0.3; "
            "drop a dataset instead of giving it 0"
        )
    shares = [float(part) for part in text.split(",")]
    if len(shares) != count:
        raise DataError(f"--prompt_data_probs {text}: {len(shares)} shares for {count} datasets")
    return [share / math.fsum(shares) for share in shares]


def blend_counts(
    sizes: Sequence[int], shares: Sequence[float] | None, limit: int, flags: DataFlags = TRAINING_FLAGS
) -> list[int]:
    """How many prompts to take of datasets with these sizes.

    With shares: the largest blend of at most ``limit`` in which every dataset has its share and no prompt is repeated.
    Without: all prompts, or if these are more than ``limit``, the datasets' own proportions. Each dataset gives at
    least one.

    :raises DataError: ``limit`` is below the number of datasets.
    """
    if limit < len(sizes):
        raise DataError(f"{flags.limit} {limit}: fewer than the {len(sizes)} datasets of {flags.data}")
    total = sum(sizes)
    if shares is None:
        if total <= limit:
            return list(sizes)
        shares = [size / total for size in sizes]
    whole = min(float(limit), *(size / share for size, share in zip(sizes, shares, strict=True)))
    # Slightly more, so that 0.3 × 10 is 3 and not 2.999….
    counts = [max(1, min(size, math.floor(whole * share + 1e-9))) for size, share in zip(sizes, shares, strict=True)]
    while sum(counts) > limit:  # only because of rounding up to one prompt
        counts[counts.index(max(counts))] -= 1
    return counts


def choose(size: int, count: int, seed: int) -> list[int]:
    """``count`` of ``size`` positions, in order; all of them, or a seeded draw."""
    return list(range(size)) if count == size else sorted(random.Random(seed).sample(range(size), count))
