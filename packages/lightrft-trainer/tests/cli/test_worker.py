from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightrft.cli.launch import ASKED_FILE, EXIT_FAILED, LAUNCH_DIR

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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
