"""Who is late, with what: the error of the ranks that waited names the one that did not come."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist

from lightrft.strategy.errors import RankTimeoutError
from lightrft.strategy.journal import RankJournal
from lightrft.strategy.native_strategy import NativeStrategy
from lightrft.testing.ranks import RankPool, announce


class Joined(NativeStrategy):
    """A strategy of several ranks, just to talk."""

    name = "joined"


def strategy(timeout: float = 3.0) -> Joined:
    one = Joined(train_batch_size=2, dist_timeout=timeout)
    one.setup_distributed()
    return one


def waits_for_rank_1() -> str:
    mine = strategy()
    mine.all_reduce(1)
    if mine.rank == 1:
        announce("away")
        time.sleep(600)
    try:
        mine.all_gather_object("the waiting line")
    except RankTimeoutError as error:
        return str(error)
    return "nobody was late"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_and_a_stalled_rank_are_named_with_their_last_operation(ranks: RankPool, number: signal.Signals) -> None:
    job = ranks.submit(waits_for_rank_1)
    job.wait_for(1, "away")
    job.signal(1, number)
    waited = job.outcomes(timeout=60, of=[0])[0]
    assert waited.ok, waited.error
    message = waited.value
    assert "all_gather_object" in message, "what the others waited in"
    assert re.search(r"Late: rank 1, last seen in all_reduce \(number 1\) at .*test_journal\.py:\d+", message), message
    assert "test_journal.py" in message.split("Late:")[0], "and where"
    assert "--dist_timeout" in message


def different_work() -> str:
    mine = strategy()
    try:
        with mine.waits_for_ranks("a step"):
            raise ValueError("the work itself is wrong")
    except ValueError as error:
        return str(error)


def test_an_error_of_the_work_itself_passes_through(ranks: RankPool) -> None:
    assert ranks.run(different_work) == ["the work itself is wrong"] * 2


def nested_operations() -> str:
    mine = strategy()
    if mine.rank == 1:
        announce("away")
        time.sleep(600)
    try:
        with mine.waits_for_ranks("the outer operation"):
            mine.all_reduce(1)
    except RankTimeoutError as error:
        return str(error)
    return "nobody was late"


def test_the_innermost_operation_is_named_once(ranks: RankPool) -> None:
    job = ranks.submit(nested_operations)
    job.wait_for(1, "away")
    job.signal(1, signal.SIGKILL)
    message = job.outcomes(timeout=60, of=[0])[0].value
    assert message.startswith("all_reduce")
    assert "rank 1, last seen in setup_distributed" in message


def refuses_to_wait_longer() -> float:
    mine = strategy(timeout=1.0)
    if mine.rank == 1:
        announce("away")
        time.sleep(600)
    begun = time.monotonic()
    with pytest.raises(RankTimeoutError):
        mine.barrier()
    return time.monotonic() - begun


def test_the_others_leave_within_the_deadline(ranks: RankPool) -> None:
    """Not a test of speed: an hour is torch's own patience."""
    job = ranks.submit(refuses_to_wait_longer)
    job.wait_for(1, "away")
    assert job.outcomes(timeout=60, of=[0])[0].value < 25


def test_a_rank_alone_posts_nothing() -> None:
    journal = RankJournal(0, 1, 5.0)
    with journal.operation("anything"):
        pass
    assert journal.sequence == 0
    assert not dist.is_initialized()


def fake_beside_others(folder: Any) -> tuple[int, list[int]]:
    """FakeStrategy is one process in any world: it waits for nobody."""
    from lightrft.strategy.fake_strategy import FakeStrategy

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        return 0, []
    import torch

    fake = FakeStrategy()
    model = torch.nn.Linear(2, 1)
    fake.prepare(model)
    fake.create_optimizer(model)
    fake.save_ckpt(model, folder)
    fake.load_ckpt(model, folder)
    fake.setup_inference_engine(None, engine_type="vllm", actor=model)
    assert len(fake.gather_and_generate({"max_tokens": 2}, [[1]])) == 1
    return fake.all_reduce(5, "sum"), fake.all_gather_object(3)


def test_a_fake_strategy_waits_for_nobody(ranks: RankPool, tmp_path: Any) -> None:
    assert ranks.run(fake_beside_others, tmp_path)[0] == (5, [3])
