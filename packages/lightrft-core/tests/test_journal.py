"""Who is late, with what: the error of the ranks that waited names the one that did not come."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from lightrft.strategy import journal
from lightrft.strategy.blame import Beat, Departure, Entry, RankNotes, blame
from lightrft.strategy.errors import CheckpointError, LightRFTError, RankTimeoutError, RolloutError
from lightrft.strategy.journal import RankJournal, note_departure
from lightrft.strategy.native_strategy import NativeStrategy
from lightrft.strategy.sealed_file import SealedFile, seal_of
from lightrft.testing.ranks import RankPool, announce


class Joined(NativeStrategy):
    """A strategy of several ranks, just to talk."""

    name = "joined"


def strategy(timeout: float = 2.0) -> Joined:
    one = Joined(train_batch_size=2, dist_timeout=timeout)
    one.setup_distributed()
    return one


def lives_on() -> None:
    """What rank 1 does until rank 0 has given up waiting for it."""
    _store().wait(["gave up"], timedelta(seconds=60))


def given_up(error: RankTimeoutError) -> str:
    """Its message; the other rank may go."""
    _store().set("gave up", "")
    return str(error)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


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
    cause = message.split("Cause: ")[1]
    assert re.match(r"rank 1, last seen in all_reduce \(number 1\) at .*test_journal\.py:\d+", cause), message
    assert "is silent for" in cause
    assert "test_journal.py" in message.split("Cause:")[0], "and where"
    assert "--dist_timeout" in message


def stalls_inside() -> str | None:
    """Rank 1 lives, has entered the operation like everybody, and does not go on."""
    mine = strategy()
    mine.all_reduce(1)
    try:
        with mine.waits_for_ranks("an operation of two parts"):
            dist.barrier()
            if mine.rank == 1:
                lives_on()
                return None
            dist.barrier()
    except RankTimeoutError as error:
        return given_up(error)
    return "nobody was late"


def test_a_rank_that_stalls_inside_an_operation_is_named_by_its_collectives(ranks: RankPool) -> None:
    message = ranks.run(stalls_inside)[0]
    assert message.startswith("an operation of two parts (number 2)")
    cause = message.split("Cause: ")[1]
    assert re.match(r"rank 1, last seen in an operation of two parts \(number 2\) .*, is 1 collective behind", cause)
    assert re.search(r"now at .*test_journal\.py:\d+ \(lives_on\)", cause), message


def beats_while_all_is_well() -> list[int]:
    mine: Joined = strategy()
    looked: list[int] = []
    with mock.patch.object(journal, "stands_at", looked.append):
        mine.all_reduce(1)
        time.sleep(0.5)  # five beats
        mine.barrier()
    return looked


def test_a_heart_looks_at_no_thread_that_nobody_asks_about(ranks: RankPool) -> None:
    """Python bears it now and then, not thousands of times."""
    assert ranks.run(beats_while_all_is_well) == [[], []]


def raises_inside(kind: type[Exception]) -> str:
    mine = strategy()
    mine.all_reduce(1)
    try:
        with mine.waits_for_ranks("some work"):
            if mine.rank == 1:
                raise kind("no data left")
            dist.barrier()
    except RankTimeoutError as error:
        return given_up(error)
    except kind:
        lives_on()  # as a notebook would: the process lives on
    return "passed through"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_rank_that_raises_inside_an_operation_is_named_with_its_error(ranks: RankPool, kind: type[Exception]) -> None:
    waited, raised = ranks.run(raises_inside, kind)
    assert raised == "passed through", "it keeps its own error"
    assert re.search(
        rf"Cause: rank 1 raised {kind.__name__}: no data left, in some work \(number 2\) at .*test_journal\.py:\d+$",
        waited,
    ), waited


def raises_between(how: str) -> str:
    mine = strategy()
    mine.all_reduce(1)
    if mine.rank == 1:
        try:
            raise ValueError("a wrong reward")
        except ValueError as error:
            note_departure(error if how == "raised" else None)  # as an uncaught exception, and the end, would
            lives_on()
            return ""
    with pytest.raises(RankTimeoutError) as caught:
        mine.barrier()
    return given_up(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raised", r"rank 1 raised ValueError: a wrong reward, at .*test_journal\.py:\d+"),
        ("ended", "rank 1, .*, has ended"),
    ],
)
def test_a_rank_that_ends_between_operations_is_named(ranks: RankPool, how: str, said: str) -> None:
    assert re.search(f"Cause: {said}", ranks.run(raises_between, how)[0])


def raised_long_ago() -> str:
    mine = strategy()
    for _ in range(2):
        with contextlib.suppress(ValueError), mine.waits_for_ranks("a try"):
            if mine.rank == 1:
                raise ValueError("handled")
        mine.all_reduce(1)
    if mine.rank == 1:
        lives_on()
        return ""
    with pytest.raises(RankTimeoutError) as caught:
        mine.barrier()
    return given_up(caught.value)


def test_an_exception_that_was_handled_is_no_cause(ranks: RankPool) -> None:
    message = ranks.run(raised_long_ago)[0]
    assert "rank 1, last seen in all_reduce" in message
    assert "handled" not in message


def libraries_own_groups() -> list[float]:
    mine = strategy(timeout=40.0)
    before: Any = dist.new_group(backend="gloo")  # with half an hour of patience
    with mine.waits_for_ranks("a library's work"):
        within: Any = dist.new_group(backend="gloo")
        groups: Any = [dist.group.WORLD, before, within]
        return [one._get_backend(mine.device).options._timeout.total_seconds() for one in groups]


def test_a_group_that_a_library_made_keeps_the_deadline_too(ranks: RankPool) -> None:
    assert ranks.run(libraries_own_groups) == [[35.0] * 3] * 2, "the rest is for finding out who is at fault"


def does_not_come_back(folder: Any) -> None:
    """As over NCCL: no exception ends the wait of rank 0."""
    dist.init_process_group("gloo")
    journal = RankJournal(dist.get_rank(), 2, 3.0, ends_process=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error{journal.rank}.json")
    if journal.rank == 1:
        announce("away")
        time.sleep(600)
    with journal.operation("a wait without end"):
        dist.barrier()


def test_where_no_exception_ends_a_wait_the_process_ends_with_the_named_error(ranks: RankPool, tmp_path: Any) -> None:
    job = ranks.submit(does_not_come_back, tmp_path)
    job.wait_for(1, "away")
    job.signal(1, signal.SIGSTOP)
    outcome = job.outcomes(timeout=60, of=[0])[0]
    assert outcome.died == 1
    message = json.loads((tmp_path / "error0.json").read_text())["message"]
    assert "Cause: rank 1, last seen in setup_distributed" in message["message"]
    assert message["extraInfo"]["secondary"], "the launcher looks for a better cause"
    assert message["message"] in ranks.output(0)


def test_a_rank_that_writes_and_reads_its_own_files_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the journal ends the process, a long save is no wait; what stands still after it is one."""
    mine: Any = SimpleNamespace(stop=threading.Event(), stack=["save_ckpt"], since=time.monotonic())
    watched: Any = SimpleNamespace(interval=0.02, wait_seconds=1.0, explain=lambda *_: "stood still")
    ended: list[float] = []

    def end(*_: Any) -> None:
        ended.append(time.monotonic())
        mine.stop.set()

    monkeypatch.setattr(journal, "_is_current", lambda _: True)
    monkeypatch.setattr(journal, "_end_process", end)
    watch = threading.Thread(target=journal._end_waits, args=(watched, mine, None))
    watch.start()
    until = time.monotonic() + 0.9
    with SealedFile(tmp_path / "state") as file:
        while time.monotonic() < until:
            file.write(b"x")
            time.sleep(0.05)
    until += 0.9
    while time.monotonic() < until:
        seal_of(tmp_path / "state", flush=False)
        time.sleep(0.05)
    assert not ended
    watch.join(timeout=60)
    assert len(ended) == 1


def agrees(broken: int | None, problem: Exception | None = None) -> str:
    mine = strategy(timeout=20.0)
    try:
        with mine.together("shared work", CheckpointError):
            if mine.rank == broken:
                raise problem or OSError("disk full")
    except (OSError, LightRFTError) as error:
        return f"{type(error).__name__}: {error}"
    return f"all done {mine.all_reduce(1, 'sum')}"


def test_all_ranks_raise_where_one_does(ranks: RankPool) -> None:
    assert ranks.run(agrees, None) == ["all done 2"] * 2
    for broken in (0, 1):
        results = ranks.run(agrees, broken)
        assert results[broken] == "OSError: disk full"
        assert results[1 - broken] == f"CheckpointError: rank {broken}: OSError: disk full"


@pytest.mark.parametrize("kind", [RolloutError, TimeoutError])
def test_work_that_was_late_is_told_and_not_taken_for_a_lost_rank(ranks: RankPool, kind: type[Exception]) -> None:
    late = kind("the engine was late: raise --engine_timeout")
    told = f"{kind.__name__}: {late}"
    assert ranks.run(agrees, 1, late) == [f"CheckpointError: rank 1: {told}", told]


def echoes() -> list[str]:
    """What this rank raises where rank 0 fails: in work for its sequence group, and in refusing its own prompts."""
    mine = Joined(train_batch_size=1, sp_size=2, dist_timeout=20.0)
    mine.setup_inference_engine(None, "fake")

    def grade() -> None:
        raise KeyError("no label")

    def generate() -> None:
        mine.gather_and_generate({"max_tokens": 1}, [[5]] if mine.rank else [[]])

    raised = []
    for act in (lambda: mine.once_a_sequence(grade, CheckpointError), generate):
        with pytest.raises((KeyError, ValueError, CheckpointError)) as caught:
            act()
        echo = isinstance(caught.value, LightRFTError) and caught.value.of_another_rank
        raised.append(f"{'echo' if echo else 'cause'}, {type(caught.value).__name__}: {caught.value}")
    return raised


def test_what_another_rank_raised_is_no_cause_of_its_own(ranks: RankPool) -> None:
    causes, told = ranks.run(echoes)
    assert [text.split(":")[0] for text in causes] == ["cause, KeyError", "cause, ValueError"]
    assert told[0] == "echo, CheckpointError: rank 0: KeyError: 'no label'"
    assert told[1].startswith("echo, PromptError: rank 0: ValueError: ")


def agrees_alone() -> str:
    mine = strategy(timeout=6.0)
    if mine.rank == 1:
        announce("away")
        time.sleep(600)
    with pytest.raises(RankTimeoutError) as caught, mine.together("shared work"):
        pass
    return str(caught.value)


def test_nobody_waits_for_the_agreement_of_a_dead_rank(ranks: RankPool) -> None:
    job = ranks.submit(agrees_alone)
    job.wait_for(1, "away")
    job.signal(1, signal.SIGKILL)
    message = job.outcomes(timeout=60, of=[0])[0].value
    assert "Cause: rank 1, last seen in setup_distributed" in message
    assert "is silent" in message


def test_what_is_surest_is_blamed() -> None:
    def notes(number: int, beat: int, departure: Departure | None = None, started: int = 5) -> RankNotes:
        return RankNotes(
            entry=Entry(sequence=number, name="work", site="a.py:1"),
            beat=Beat(number=beat, wall=0.0, started={"world": started}, answered=1, at="b.py:2 (f)"),
            departure=departure,
        )

    gave_up = Departure(how="gave up", sequence=7, text="gave up waiting")
    before = {1: notes(7, 1), 2: notes(7, 1), 3: notes(7, 1), 4: notes(7, 1)}
    after = {1: notes(7, 2, started=4), 2: notes(6, 2), 3: notes(7, 2, gave_up), 4: notes(7, 1)}

    def blamed() -> list[str]:
        return [text.split(",")[0].split(" raised")[0] for text in blame(7, {"world": 5}, before, after)]

    assert blamed() == ["rank 4"], "silent"
    after[4] = notes(7, 2)
    assert blamed() == ["rank 2"], "behind"
    after[2] = notes(7, 2)
    assert blamed() == ["rank 1"], "fewer collectives"
    after[1] = notes(7, 2)
    assert blamed() == ["rank 3 gave up waiting"]
    after[3] = notes(7, 2, Departure(how="raised", sequence=7, text="ValueError: x"))
    assert blamed() == ["rank 3"]
    after[3] = notes(8, 2)
    assert blame(7, {"world": 5}, before, after)[0] == "unknown, all other ranks are alive"


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
