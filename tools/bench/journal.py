"""What it costs an operation to be noted in the ranks' journal, so that a failed wait can name the culprit.

    python tools/bench/journal.py

Two ranks enter and leave an empty operation many times; the medians of batches are compared with an empty context.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from launch_ranks import become_ranks

from lightrft.strategy import get_strategy

log = logging.getLogger("bench.journal")
BATCH = 200


def microseconds(operation: Callable[[], AbstractContextManager[None]], batches: int) -> float:
    """Of one operation: the median of batches."""
    found = []
    for _ in range(batches):
        begun = time.perf_counter()
        for _ in range(BATCH):
            with operation():
                pass
        found.append((time.perf_counter() - begun) / BATCH * 1e6)
    return statistics.median(found)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    become_ranks(args.ranks)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    strategy = get_strategy({"fsdp": True})
    strategy.setup_distributed()
    noted = microseconds(lambda: strategy.waits_for_ranks("bench"), args.batches)
    empty = microseconds(contextlib.nullcontext, args.batches)
    strategy.barrier()
    if strategy.is_rank_0():
        log.info("%.1f µs an operation, %.1f µs an empty context (%d ranks)", noted, empty, args.ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
