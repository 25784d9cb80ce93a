"""``kill -9`` of a rank at any moment, then ``--resume``: the final weights are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightrft.trainer.metrics import read_metrics

Tiny = Callable[..., Any]
START_SECONDS = 240.0


def kill_one(command: Any, victim: int) -> None:
    pids = sorted(command.rank_pids())
    os.kill(pids[victim % len(pids)], signal.SIGKILL)


def check_the_aftermath(command: Any, run: Path) -> None:
    assert command.finish() == 1
    shown = command.output()
    assert "was killed by SIGKILL" in shown
    saved = (run / "checkpoints" / "latest").exists()  # not where the first save was still being written
    assert ("Continue from the last checkpoint with:" if saved else "There is no checkpoint yet. Start again") in shown
    assert "Traceback" not in shown
    assert command.rank_pids() == []


def moment(seed: int) -> tuple[int, float, int]:
    """(after which step, seconds later, victim). Each step passes twice over its buffer, so most moments are in a
    reused one."""
    rng = random.Random(seed)
    return rng.randrange(1, 7), rng.uniform(0, 0.3), rng.randrange(2)


def test_a_rank_killed_in_the_middle_of_training(
    tiny_under_torchrun: Tiny, tmp_path: Path, uninterrupted: Path, same_weights: Callable[[Path, Path], None]
) -> None:
    step, delay, victim = moment(0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    job = tiny_under_torchrun(tmp_path, slow=True)
    deadline = time.monotonic() + START_SECONDS
    while len(read_metrics(metrics)) < step and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    job.signal(victim, signal.SIGKILL)
    assert job.outcomes(grace=1.0)[victim].died == -signal.SIGKILL
    tiny_under_torchrun(tmp_path, "--resume").results()
    same_weights(tmp_path / "run", uninterrupted)
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 9))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_rank_of_the_commands_own(
    tiny: Tiny,
    tiny_under_torchrun: Tiny,
    tmp_path: Path,
    uninterrupted: Path,
    same_weights: Callable[[Path, Path], None],
    seed: int,
) -> None:
    """The launcher tells who was killed, and how to go on."""
    step, delay, victim = moment(seed)
    command = tiny(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert command.wait_until(lambda: len(read_metrics(metrics)) >= step)
    time.sleep(delay)
    kill_one(command, victim)
    check_the_aftermath(command, tmp_path / "run")
    tiny_under_torchrun(tmp_path, "--resume").results()
    same_weights(tmp_path / "run", uninterrupted)
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("step", "victim", "operation"),
    [
        pytest.param(1, 0, 7, marks=pytest.mark.full),
        (3, 1, 3),
        pytest.param(5, 0, 20, marks=pytest.mark.full),
    ],
)
def test_a_rank_killed_in_the_middle_of_a_save(
    tiny_under_torchrun: Tiny,
    tmp_path: Path,
    uninterrupted: Path,
    same_weights: Callable[[Path, Path], None],
    step: int,
    victim: int,
    operation: int,
) -> None:
    """On the pool's ranks, so that one can wait within its save to be killed; fresh ones resume."""
    final = tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
    staging = final.with_name(f".{final.name}.partial")
    job = tiny_under_torchrun(tmp_path, held=(victim, staging, operation))
    job.wait_for(victim, "held")
    assert staging.is_dir()
    job.signal(victim, signal.SIGKILL)
    assert job.outcomes(grace=1.0)[victim].died == -signal.SIGKILL
    assert not final.exists()
    tiny_under_torchrun(tmp_path, "--resume").results()
    same_weights(tmp_path / "run", uninterrupted)


@pytest.mark.full
def test_ranks_that_all_die_at_once_leave_word_how_to_go_on(tiny: Tiny, tmp_path: Path) -> None:
    """None of them lives to report an error, so the launcher must know the run's folder already."""
    command = tiny(tmp_path)
    assert command.wait_until((tmp_path / "run" / "checkpoints" / "latest").exists)
    for pid in command.rank_pids():
        os.kill(pid, signal.SIGKILL)
    check_the_aftermath(command, tmp_path / "run")


@pytest.mark.full  # test_launch.py holds which of several failures is told
def test_a_reward_that_raises_on_one_rank_ends_the_run_with_that_ranks_error(
    tiny: Tiny, tiny_run: Path, tmp_path: Path
) -> None:
    (tiny_run.parent / "broken_reward.py").write_text(
        "import os\n"
        "def odd(prompts, responses, labels, **extras):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('no such label')\n"
        "    return [0.0] * len(responses)\n"
    )
    command = tiny(tmp_path, "--reward", "broken_reward:odd")
    assert command.finish() == 1
    shown = command.output()
    assert "lightrft: rank 1: " in shown
    assert "KeyError: 'no such label'" in shown
    assert "rank 0" not in shown
    assert command.rank_pids() == []


@pytest.mark.full  # the suite stalls ranks in every operation; here the launcher tells
def test_a_stalled_rank_ends_the_run_and_is_named(tiny: Tiny, tmp_path: Path) -> None:
    command = tiny(tmp_path, "--dist_timeout", "8")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert command.wait_until(lambda: len(read_metrics(metrics)) >= 1)
    os.kill(sorted(command.rank_pids())[-1], signal.SIGSTOP)
    assert command.finish() == 1
    shown = command.output()
    assert "Cause: rank" in shown
    assert "is silent" in shown
    assert command.rank_pids() == []
