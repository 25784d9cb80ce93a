from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from lightrft.testing import RankFailure, RankPool, announce, torchrun


@dataclass
class Place:
    rank: int
    tensor: torch.Tensor


def place(offset: int) -> Place:
    return Place(int(os.environ["RANK"]) + offset, torch.arange(2)[1:])


def joins() -> tuple[int, int, float]:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def fails_on_rank_1(message: str) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        expected = message
        sys.stdout.write("a last word")
        assert expected == "no such thing"
    dist.barrier()


def hangs_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        announce("hanging")
        time.sleep(600)


def says_pid() -> int:
    return os.getpid()


def prints() -> None:
    sys.stdout.write(f"out of {os.environ['RANK']}\n")
    sys.stderr.write(f"err of {os.environ['RANK']}\n")
    os.system("echo child of $RANK")


def draws() -> tuple[float, int, str]:
    value = torch.rand(()).item()
    torch.set_default_dtype(torch.float64)
    os.environ["LEFT_BEHIND"] = "yes"
    return value, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def sees_leftovers() -> tuple[bool, torch.dtype]:
    return "LEFT_BEHIND" in os.environ, torch.get_default_dtype()


class Holder:
    @staticmethod
    def method() -> str:
        return "found"


def test_every_rank_runs_the_function_and_answers_in_rank_order(ranks: RankPool) -> None:
    answers = ranks.run(place, offset=10)
    assert [answer.rank for answer in answers] == [10, 11]
    assert all(isinstance(answer, Place) and answer.tensor.tolist() == [1] for answer in answers)


def test_ranks_join_each_other_as_under_torchrun_in_every_run(ranks: RankPool) -> None:
    for _ in range(3):
        assert ranks.run(joins) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_ranks_live_on_between_runs(ranks: RankPool) -> None:
    assert ranks.run(says_pid) == ranks.run(says_pid) == ranks.pids()


def test_a_run_begins_clean(ranks: RankPool) -> None:
    first = ranks.run(draws)
    assert ranks.run(draws) == first
    assert first[0][1:] == (1, "1")
    assert ranks.run(sees_leftovers) == [(False, torch.float32)] * 2


def test_output_is_captured_by_rank_and_run(ranks: RankPool) -> None:
    ranks.run(prints)
    assert ranks.output(0).split("\n")[:3] == ["out of 0", "err of 0", "child of 0"]
    assert "out of 1" in ranks.output(1)
    ranks.run(says_pid)
    assert ranks.output(0) == ""


def test_a_failure_names_the_rank_and_shows_its_traceback_values_and_output(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(fails_on_rank_1, "the value")
    text = str(failure.value)
    assert "fails_on_rank_1 failed on rank" in text
    assert 'assert expected == "no such thing"' in text
    assert "expected = 'the value'" in text
    assert "a last word" in text
    assert text.index("---- rank 1") < text.index("---- rank 0")
    assert isinstance(failure.value.outcomes[1].exception, AssertionError)
    assert ranks.run(joins) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_a_late_rank_is_named_with_the_line_where_it_stands(ranks: RankPool) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(hangs_on_rank_1, timeout=1.0)
    text = str(failure.value)
    assert text.startswith("hangs_on_rank_1 failed on rank 1\n")
    assert "in hangs_on_rank_1" in text
    assert failure.value.outcomes[0].ok
    assert failure.value.outcomes[1].late
    assert ranks.run(joins) == [(0, 2, 3.0), (1, 2, 3.0)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_rank_is_named_with_its_signal(ranks: RankPool, number: signal.Signals) -> None:
    job = ranks.submit(hangs_on_rank_1)
    job.wait_for(1, "hanging")
    job.signal(1, number)
    outcomes = job.outcomes()
    assert outcomes[0].ok
    assert outcomes[1].died == -number
    assert number.name in (outcomes[1].error or "")
    assert ranks.run(joins) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_a_stopped_rank_is_late_and_does_not_outlive_the_run(ranks: RankPool) -> None:
    job = ranks.submit(hangs_on_rank_1)
    job.wait_for(1, "hanging")
    pid = ranks.pids()[1]
    job.signal(1, signal.SIGSTOP)
    outcome = job.outcomes(timeout=0.5)[1]
    assert outcome.late
    assert "stopped" in (outcome.error or "")
    assert not psutil.pid_exists(pid)


def test_waiting_for_what_is_never_announced_fails(ranks: RankPool) -> None:
    job = ranks.submit(says_pid)
    with pytest.raises(RankFailure, match="never announced 'hanging'"):
        job.wait_for(0, "hanging", timeout=30)


def test_a_function_is_found_by_name_in_its_file(ranks: RankPool) -> None:
    assert ranks.run(Holder.method) == ["found", "found"]
    with pytest.raises(ValueError, match="top level of its module"):
        ranks.run(lambda: None)


def test_a_pool_of_no_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        RankPool(0)


SCRIPT = """
from lightrft.testing import RankPool
from lightrft.testing.ranks import announce
import os, signal, sys, time

def hangs():
    announce("hanging")
    time.sleep(600)

if __name__ == "__main__":
    pool = RankPool(2, preload=["lightrft.testing.ranks"])
    job = pool.submit(hangs)
    job.wait_for(0, "hanging"); job.wait_for(1, "hanging")
    print(*pool.pids(), flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("ending", ["kill", pytest.param("exit", marks=pytest.mark.full)])
def test_no_rank_outlives_the_test_process(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script), ending], capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if ending == "kill" else 0), done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, f"ranks {pids} are still there"
        time.sleep(0.05)


LAUNCHED = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(1.0); dist.all_reduce(total)
print("node", os.environ["GROUP_RANK"], "rank", dist.get_rank(), "of", int(total), sys.argv[1:])
dist.destroy_process_group()
"""


@pytest.mark.full
def test_torchrun_launches_two_nodes_on_this_machine(tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    nodes = torchrun(script, "word", nproc_per_node=1, nnodes=2)
    assert [node.returncode for node in nodes] == [0, 0], nodes
    assert [f"node {n} rank {n} of 2 ['word']" in node.output for n, node in enumerate(nodes)] == [True, True]
