"""A benchmark's own ranks: the script starts itself again under torch's launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def ranks_command(ranks: int) -> tuple[list[str], dict[str, str]]:
    """What starts this very script on so many ranks, a thread each: words and environment."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, *sys.argv], rank_environment()


def rank_environment() -> dict[str, str]:
    """A thread a rank, and the benchmarks' own modules beside what is found already."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def become_ranks(ranks: int) -> None:
    """Go on as the launcher, unless this process is a rank already."""
    if "RANK" not in os.environ:
        words, environment = ranks_command(ranks)
        os.execve(words[0], words, environment)
