from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightrft.cli import launch
from lightrft.cli.launch import ASKED_FILE, EXIT_FAILED, EXIT_INTERRUPTED, LAUNCH_DIR
from lightrft.cli.main import build_parser
from lightrft.cli.worker import run_rank
from lightrft.strategy.config import StrategyConfig
from lightrft.trainer import run

# A launcher that starts one rank. The rank does not heed SIGTERM, as one that is stuck in a library's wait cannot.
RANK = """
import os, signal, sys, time
from lightrft.cli.worker import join_launcher
signal.signal(signal.SIGTERM, lambda *_: None)
join_launcher(patience=0.2)
print(os.getpid(), flush=True)
while True:
    time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_rank_that_is_stuck_does_not_survive_its_launcher() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    assert Path(f"/proc/{rank}").exists()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while _alive(rank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(rank)


TOLD = """
import signal, time
from lightrft.cli import worker
worker.FAREWELL_SECONDS = 0.2
signal.signal(signal.SIGTERM, lambda *_: None)
worker.join_launcher()
print("joined", flush=True)
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize("asked", [False, True], ids=["another failed", "the user asked"])
def test_a_stuck_rank_that_the_launcher_ends_goes_unless_the_user_wants_a_checkpoint(
    tmp_path: Path, asked: bool
) -> None:
    environment = {**os.environ, LAUNCH_DIR: str(tmp_path)}
    rank = subprocess.Popen([sys.executable, "-c", TOLD], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "joined\n"
        if asked:
            (tmp_path / ASKED_FILE).touch()
        rank.send_signal(signal.SIGTERM)
        if asked:
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(timeout=1.0)
        else:
            assert rank.wait(timeout=30) == EXIT_FAILED
    finally:
        rank.kill()
        rank.wait()


def test_a_rank_that_joins_after_the_signal_ends(tmp_path: Path) -> None:
    """The launcher could not forward it to a process that had not told its id."""
    (tmp_path / ASKED_FILE).touch()
    code = "from lightrft.cli.worker import join_launcher; join_launcher()"
    environment = {**os.environ, LAUNCH_DIR: str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == -signal.SIGTERM


def test_the_launcher_of_every_node_learns_that_the_run_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes share the run's folder, but each launcher has one of its own, and an exit code that a scheduler reads."""

    def stopped(config: StrategyConfig, *, on_output_dir: Callable[[str], None], **_: Any) -> run.RunResult:
        on_output_dir(config.output_dir)
        return run.RunResult(config.output_dir, 2, True, 1.0, {}, (), 0)

    monkeypatch.setattr(run, "train", stopped)
    for name, value in {"RANK": "8", "LOCAL_RANK": "0", LAUNCH_DIR: str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert run_rank(StrategyConfig(output_dir="run"), multimodal=False) == 0
    words = ["train", "--nnodes", "2", "--node_rank", "1", "--master_addr", "first"]
    assert launch._report(tmp_path, None, build_parser().parse_args(words)) == EXIT_INTERRUPTED
    shown = capsys.readouterr()
    assert "lightrft: stopped at step 2; a checkpoint was written. Continue with:" in shown.err
    assert "--output_dir run --nnodes 2 --node_rank 1 --master_addr first" in shown.err
    assert shown.out == "", "only rank 0 shows the report"


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left on device"), ValueError("\udce9 is no text")])
def test_an_error_reaches_the_launcher_though_nothing_can_be_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    lost = tmp_path / "file" / "run"  # a folder that cannot be made, as on a full disk

    def fail(config: StrategyConfig, *, on_output_dir: Callable[[str], None], **_: Any) -> None:
        on_output_dir(str(lost))
        raise raised

    lost.parent.touch()
    monkeypatch.setattr(run, "train", fail)
    environment = {"RANK": "0", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error"), LAUNCH_DIR: str(tmp_path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_rank(StrategyConfig(output_dir=str(lost), log_dir=str(tmp_path)), multimodal=False) == EXIT_FAILED
    told = json.loads((tmp_path / "error").read_text())["message"]["message"]
    assert told.startswith(f"{type(raised).__name__}: {raised}") and "in fail" in told
    full = isinstance(raised, OSError)
    assert bool(re.search(f"there is room for .* in {tmp_path}, .*; free some, then continue", told)) == full


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
