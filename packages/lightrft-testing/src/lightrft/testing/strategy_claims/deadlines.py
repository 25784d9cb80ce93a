"""A rank that dies or stalls: the others leave within the deadline, and their error names it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightrft.strategy.errors import RankTimeoutError
from lightrft.testing.ranks import FunctionReference, announce

from .claims import StrategyClaims, run_claim

DEADLINE = 5.0


class DeadlineClaims(StrategyClaims):
    """Needs a world of at least two ranks; in a world of one nobody can be late."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.world_size == 1 and cls.__module__ != "lightrft.testing.strategy_suite":
            for name in [name for name in vars(DeadlineClaims) if name.startswith("test_")]:
                setattr(cls, name, None)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    @pytest.mark.parametrize("work", ["talk", "train", "save"])
    def test_a_rank_that_dies_or_stalls_is_named_by_the_others(
        self, rank_pools: Any, tmp_path: Path, work: str, number: signal.Signals
    ) -> None:
        pool, last = rank_pools(self.world_size), self.world_size - 1
        job = pool.submit(run_claim, FunctionReference.of(type(self)), "_work_until_alone", tmp_path, {"work": work})
        job.wait_for(last, "away", self.timeout)
        job.signal(last, number)
        others = job.outcomes(self.timeout, of=range(last))[:last]
        for outcome in others:
            assert outcome.ok, outcome.error
            assert f"rank {last}" in outcome.value.split("Cause:")[1], outcome.value

    def _work_until_alone(self, work: str) -> str:
        """What the error of a rank that waits says; the last rank never comes."""
        strategy = self.strategy(dist_timeout=DEADLINE)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer)
        if strategy.rank == self.world_size - 1:
            announce("away")
            time.sleep(10 * self.timeout)
        try:
            if work == "talk":
                strategy.all_reduce(1)
            elif work == "train":
                self.train(strategy, model, optimizer, first=1)
            else:
                strategy.save_ckpt(model, self.folder)
        except RankTimeoutError as error:
            return str(error)
        raise AssertionError("the others went on without the last rank")
