"""No rank waits forever: if one dies, raises or stalls, the others end in time with an error that names it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.distributed as dist

from lightrft.strategy.errors import CheckpointError, RankTimeoutError
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.testing.faults import calling_first, die, watch_file_events
from lightrft.testing.ranks import FunctionReference

from .claims import StrategyClaims, next_token_loss, run_claim

DEADLINE = 8.0
FAULTS = ("raises", "is killed", "is stopped")
WORK = ("backward", "optimizer_step", "save", "gather", "weight_sync")
PLACES = ("before", "inside")


class OwnError(Exception):
    """The error of the rank at fault."""


class DeadlineClaims(StrategyClaims):
    """Needs at least two ranks.

    The last rank has a fault before or inside one operation. Of these 30 combinations each suite runs some by default,
    the others are ``full``: suites with a ``deadline_turn`` of 0, 1 and 2 together try each fault in each operation.
    """

    deadline_turn: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == "lightrft.testing.strategy_suite":
            return
        # None: the suite that it extends may have some.
        cases = _parametrized(cls.deadline_turn) if cls.world_size > 1 else None
        cls.test_a_rank_with_a_fault_is_named_by_the_others = cases

    def _disturbed_work(self, fault: str, work: str, place: str) -> str:
        """The error of a waiting rank; the last rank has a fault."""
        strategy = self.strategy(dist_timeout=DEADLINE)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        if work == "weight_sync":
            strategy.setup_inference_engine(None, engine_type="fake", actor=model)
        self.train(strategy, model, optimizer)
        strategy.barrier()
        act = _FAULTS[fault]
        try:
            if strategy.rank < self.world_size - 1:
                self._work(strategy, model, optimizer, work, nullcontext)
            elif place == "before":
                act()
            else:
                self._work(strategy, model, optimizer, work, act)
            strategy.barrier()  # if the others did not need the last rank until now
        except RankTimeoutError as error:
            return str(error).split("Cause: ")[1]
        except CheckpointError as error:  # the backend's own communication can report it
            assert (fault, work, place) == ("raises", "save", "inside")
            return re.sub(r"^.*(rank \d+: .*on purpose)", r"\1", str(error))
        raise AssertionError("the others went on without the last rank")

    def _work(self, strategy: StrategyBase, model: Any, optimizer: Any, work: str, act: Callable[[], Any]) -> None:
        """One operation, in the middle of which ``act`` is called."""
        if work in ("backward", "optimizer_step"):
            loss = next_token_loss(model, self.share(strategy, self.rows(2 * self.world_size), 2, 0))
            if work == "backward":
                loss.register_hook(lambda _: act() and None)
            strategy.backward(loss, model, optimizer)
            if work == "optimizer_step":
                optimizer.register_step_pre_hook(lambda *_: act() and None)
            strategy.optimizer_step(optimizer, model)
        elif work == "save":
            if act is not nullcontext:
                watch_file_events(self.folder, lambda count: act() if count == 1 else None)
            strategy.save_ckpt(model, self.folder)
        elif work == "gather":
            with calling_first(dist, "all_gather_object", act):
                strategy.all_gather(strategy.rank)
        else:
            with _acting_between_buckets(strategy, act):
                strategy.update_engine_weights(model)


def _raise() -> None:
    raise OwnError("on purpose")


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


_FAULTS: dict[str, Callable[[], None]] = {"raises": _raise, "is killed": die, "is stopped": _stop}


@contextmanager
def _acting_between_buckets(strategy: StrategyBase, act: Callable[[], Any]) -> Iterator[None]:
    original = strategy.export_weights

    def disturbed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for bucket in original(*args, **kwargs):
            act()
            yield bucket

    strategy.export_weights = disturbed
    try:
        yield
    finally:
        del strategy.export_weights


def _parametrized(turn: int) -> Callable[..., None]:
    """The test, for a suite: its share of the combinations by default, all of them in full runs."""

    def test(self: DeadlineClaims, rank_pools: Any, tmp_path: Path, fault: str, work: str, place: str) -> None:
        pool, last = rank_pools(self.world_size), self.world_size - 1
        params = {"fault": fault, "work": work, "place": place}
        job = pool.submit(run_claim, FunctionReference.of(type(self)), "_disturbed_work", tmp_path, params)
        outcomes = job.outcomes(self.timeout, of=range(last))
        for outcome in outcomes[:last]:
            assert outcome.ok, outcome.error
            cause = outcome.value
            assert cause.startswith(f"rank {last}"), cause
            if fault != "raises":
                assert "is silent" in cause, cause
            elif place == "inside":
                assert "on purpose" in cause, cause
            if "on purpose" not in cause:
                assert re.search(r"\(number \d+\) at \S+\.py:\d+", cause), cause

    cases = []
    for i, work in enumerate(WORK):
        for j, fault in enumerate(FAULTS):
            for k, place in enumerate(PLACES):
                default = (i + j + turn) % len(FAULTS) == 0 and (i + j // 2) % 2 != k
                marks = () if default else pytest.mark.full
                name = f"{fault} {place} {work}".replace(" ", "_")
                cases.append(pytest.param(fault, work, place, marks=marks, id=name))
    test.__name__ = "test_a_rank_with_a_fault_is_named_by_the_others"
    test.__qualname__, test.__module__ = f"DeadlineClaims.{test.__name__}", __name__
    return pytest.mark.parametrize(("fault", "work", "place"), cases)(test)
