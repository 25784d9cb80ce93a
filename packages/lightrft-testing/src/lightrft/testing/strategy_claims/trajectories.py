"""The same seed gives the same trajectory as one process, to a multiple of that process's own noise."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from lightrft.testing.trajectory import (
    BF16_ROUNDING,
    FLOORS,
    RECIPES,
    Recipe,
    cast_trajectory,
    clipping_faults,
    compare,
    deviation_table,
    every_recipe,
    reference_trajectory,
    run_trajectory,
    verdict,
)

from .claims import StrategyClaims, on_ranks


class TrajectoryClaims(StrategyClaims):
    """Twenty free-running steps: accumulation, clipping, warm-up and schedule, decay groups, and what comes between."""

    # How many times further from one process than that process from itself, regrouped.
    noise_floors: ClassVar[float] = FLOORS
    # The same in bf16, where one process computes by autocast, or with cast weights, which rounds more activations. The
    # farther counts: either may choose another of two experts that are nearly tied, and the gradient jumps with it.
    bf16_floors: ClassVar[float] = 2.0

    @pytest.mark.parametrize("name", RECIPES)
    @on_ranks
    def test_the_trajectory_is_that_of_one_process(self, name: str) -> str:
        """Pytest's ``-rP`` or ``-s`` shows the table."""
        return self.follow(name, RECIPES[name])

    @pytest.mark.full
    @pytest.mark.parametrize("number", range(len(every_recipe())))
    @on_ranks
    def test_every_variation_has_the_trajectory_of_one_process(self, number: int) -> str:
        recipe = every_recipe()[number]
        return self.follow(str(recipe), recipe)

    @pytest.mark.parametrize("kind", [pytest.param("qwen2", marks=pytest.mark.full), "qwen3_moe"])
    @on_ranks
    def test_a_bf16_gradient_is_right_to_the_rounding_of_bf16(self, kind: str) -> str:
        """Over 32 micro-batches and all ranks: summed in bf16 it would be three times as far from one backward pass."""
        exact = Recipe(kind=kind, steps=1, rows=32 * self.world_size, max_norm=0.0)
        whole = replace(exact, bf16=True)
        parts = replace(whole, accumulation=32)
        one, many = (run_trajectory(self.make_strategy(**r.settings(self.world_size)), r) for r in (whole, parts))
        expected = reference_trajectory(exact)
        ways = (reference_trajectory(whole), cast_trajectory(exact))
        alone = max(compare(way, expected).first_gradient for way in ways)
        error, regrouped = compare(many, expected).first_gradient, compare(many, one).first_gradient
        assert error <= self.bf16_floors * alone, f"{error:.1e} from fp32; one process in bf16 is {alone:.1e} from it"
        assert regrouped <= BF16_ROUNDING, f"{regrouped:.1e} from one backward pass; bf16 rounds to {BF16_ROUNDING:.1e}"
        return f"{kind}: {error:.1e} from fp32 (one process: {alone:.1e}), {regrouped:.1e} from one backward pass\n"

    def follow(self, name: str, recipe: Recipe) -> str:
        """Train by the recipe and compare; returns the table."""
        recipe = replace(recipe, rows=max(recipe.rows, recipe.accumulation * self.world_size))
        strategy = self.make_strategy(**recipe.settings(self.world_size))
        trajectory = run_trajectory(strategy, recipe)
        reference = reference_trajectory(recipe)
        assert not (faults := clipping_faults(recipe, reference)), faults
        mine, title = compare(trajectory, reference), f"{strategy.name}, {self.world_size} ranks"
        faults, floor = verdict(mine, recipe, self.noise_floors)
        table = deviation_table({f"{name}: one process, disturbed": floor, f"{name}: {title}": mine})
        assert not faults, f"{faults}\n{table}"
        return table
