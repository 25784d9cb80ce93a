from __future__ import annotations

import os
import signal
import subprocess
import sys

from lightrft.trainer.interruption import Interruption


def test_the_first_signal_only_asks() -> None:
    with Interruption() as interruption:
        assert not interruption.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.asked
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher repeats itself; that is no second wish


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_ends_the_process() -> None:
    code = """
import os, signal
from lightrft.trainer.interruption import Interruption
with Interruption():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 128 + signal.SIGINT
    assert "still here" not in result.stdout
