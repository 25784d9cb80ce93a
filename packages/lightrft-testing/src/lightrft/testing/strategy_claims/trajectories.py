"""The same seed gives the same trajectory as one process, to a multiple of that process's own noise."""

from __future__ import annotations

import pytest

from lightrft.testing.trajectory import (
    FLOORS,
    Recipe,
    compare,
    deviation_table,
    noise_floor,
    reference_trajectory,
    run_trajectory,
)

from .claims import StrategyClaims, on_ranks


class TrajectoryClaims(StrategyClaims):
    """Twenty free-running steps: accumulation, clipping, warm-up and schedule, decay groups."""

    # How many times further from one process than that process from itself, regrouped.
    noise_floors: float = FLOORS

    @pytest.mark.parametrize("accumulation", [1, 4])
    @pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
    @on_ranks
    def test_the_trajectory_is_that_of_one_process(self, kind: str, accumulation: int) -> str:
        """Pytest's ``-rP`` or ``-s`` shows the table."""
        recipe = Recipe(kind=kind, accumulation=accumulation, rows=4 * self.world_size)
        strategy = self.make_strategy(**recipe.settings(self.world_size))
        trajectory = run_trajectory(strategy, recipe)
        reference = reference_trajectory(recipe)
        assert min(reference.grad_norms) > recipe.max_norm, "every step must clip"
        floor, mine = noise_floor(recipe, reference), compare(trajectory, reference)
        name = f"{strategy.name}, {self.world_size} ranks, accumulation {accumulation}"
        table = deviation_table({f"{kind}: one process, regrouped": floor, f"{kind}: {name}": mine})
        assert not (faults := mine.within(floor, self.noise_floors)), f"{faults}\n{table}"
        return table
