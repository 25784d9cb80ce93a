from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
