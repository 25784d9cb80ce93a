"""Twenty free steps on two ranks, in the settings of clipping that the standard suite leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from lightrft.fsdp import FSDPV2Strategy
from lightrft.testing.trajectory import Recipe, compare, noise_floor, reference_trajectory, run_trajectory


def faults(kind: str, accumulation: int, max_norm: float) -> list[str]:
    recipe = Recipe(kind=kind, accumulation=accumulation, max_norm=max_norm)
    strategy = FSDPV2Strategy(**recipe.settings(2), dist_timeout=60.0)
    trajectory, reference = run_trajectory(strategy, recipe), reference_trajectory(recipe)
    if max_norm:
        assert max(reference.grad_norms) < max_norm, "clipping is on and never acts"
    return compare(trajectory, reference).within(noise_floor(recipe, reference))


@pytest.mark.parametrize(
    ("kind", "accumulation", "max_norm"),
    [
        ("qwen2_tied", 4, 0.0),
        pytest.param("qwen2_tied", 1, 1e6, marks=pytest.mark.full),
        pytest.param("qwen2", 1, 0.0, marks=pytest.mark.full),
        pytest.param("qwen3_moe", 4, 1e6, marks=pytest.mark.full),
    ],
)
def test_without_active_clipping_the_trajectory_is_that_of_one_process(
    ranks: Any, kind: str, accumulation: int, max_norm: float
) -> None:
    for found in ranks.run(faults, kind, accumulation, max_norm):
        assert not found
