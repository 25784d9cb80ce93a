from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightrft.testing.engine_claims.life import _leaked

HOLDS_ONE = """
import multiprocessing
held = multiprocessing.get_context("spawn").Semaphore()
print(held._semlock.name, flush=True)
input()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system does not show its shared memory")
def test_a_semaphore_leaks_from_this_test_alone() -> None:
    mine: Any = multiprocessing.get_context("spawn").Semaphore()
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert other.stdout is not None
    own, foreign = (f"sem.{Path(name.strip()).name}" for name in (mine._semlock.name, other.stdout.readline()))
    assert _leaked({own, foreign}, seconds=0.0) == {own}
    other.communicate("\n")
    assert other.returncode == 0
