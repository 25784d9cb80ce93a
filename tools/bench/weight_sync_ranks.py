"""Bandwidth and extra memory of a weight sync from sharded weights, against a bare all-gather of the same bytes.

    python tools/bench/weight_sync_ranks.py --model smollm2 --bucket-mb 16 64 512
    .nox/vllm_integration/bin/python tools/bench/weight_sync_ranks.py --engine vllm

Each rank holds its rows (FSDP2) and an engine of its own. A tiny ``--bucket-mb`` is one gather a parameter.
``export`` gathers the buckets, ``sync`` is ``update_engine_weights``: gather, load, verify, receipt. The bare
all-gather moves as many bytes through a buffer of the bucket's size. Rounds alternate between the three. Extra memory
is the rise of the process's resident size.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from hf_engine import MODELS
from launch_ranks import become_ranks
from resident import resident_rise
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lightrft.fsdp import FSDPV2Strategy
from lightrft.strategy.weights import UpdatePlan

log = logging.getLogger("bench.weight_sync_ranks")
MIB = 2**20


def bare_all_gather(nbytes: int, bucket_bytes: int) -> Callable[[], None]:
    """Gather ``nbytes`` in pieces of at most ``bucket_bytes`` into one buffer."""
    ranks = dist.get_world_size()
    size = min(bucket_bytes, nbytes) // (4 * ranks) * ranks
    whole, mine = torch.zeros(size), torch.zeros(size // ranks)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def run() -> None:
        left = nbytes // 4 // ranks * ranks
        while left:
            part = min(left, size)
            gather(whole[:part], mine[: part // ranks])
            left -= part

    return run


def timed(run: Callable[[], Any]) -> float:
    """Seconds from when all ranks are there until all have ended."""
    dist.barrier()
    begun = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - begun


def measure(name: str, engine: str, bucket_mb: float, rounds: int) -> None:
    """Time the three in turn and log them on rank 0."""
    bucket_bytes = int(bucket_mb * MIB)
    settings: Any = {"weight_bucket_mb": bucket_mb, "enable_engine_sleep": False, "engine_type": engine}
    batch = {"micro_train_batch_size": 1, "train_batch_size": dist.get_world_size()}
    extra = {"kv_cache_memory_bytes": 64 * MIB} if engine == "vllm" else {}
    lengths = {"max_model_len": 64, "prompt_max_len": 32}
    strategy = FSDPV2Strategy(args={**settings, **batch, **lengths, "engine_extra": extra})
    torch.manual_seed(0)
    model = strategy.prepare(AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32))
    specs = tuple(strategy.export_spec(model))
    nbytes = sum(spec.nbytes for spec in specs)
    plan = UpdatePlan(version=1, specs=specs, bucket_bytes=bucket_bytes)

    def export() -> None:
        for _ in strategy.export_weights(model, plan):
            pass

    rise = max(strategy.all_gather_object(resident_rise(export)))
    bare = bare_all_gather(nbytes, bucket_bytes)
    strategy.setup_inference_engine(None, engine, model)
    kinds = {"all-gather": bare, "export": export, "sync": lambda: strategy.update_engine_weights(model)}
    rise_of_sync = max(strategy.all_gather_object(resident_rise(kinds["sync"])))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for counted in range(-1, rounds):
        for kind, run in kinds.items():
            spent = timed(run)
            if counted >= 0:
                seconds[kind].append(spent)
    if strategy.is_rank_0():
        bare_s, export_s, sync_s = (statistics.median(seconds[kind]) for kind in kinds)
        log.info(
            "%s into %s, %.1f MiB, buckets of %g MiB: all-gather %.1f ms (%.2f GB/s), export %.1f ms (%.2f ×), "
            "sync %.1f ms (%.2f ×); extra memory of an export at most %.1f MiB, of a sync %.1f MiB (largest tensor "
            "%.1f MiB)",
            *(name, engine, nbytes / MIB, bucket_mb, bare_s * 1e3, nbytes / bare_s / 1e9),
            *(export_s * 1e3, bare_s / export_s, sync_s * 1e3, bare_s / sync_s),
            *(rise / MIB, rise_of_sync / MIB, max(spec.nbytes for spec in specs) / MIB),
        )
    strategy.engine_host.shutdown()


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--engine", default="hf")
    parser.add_argument("--bucket-mb", type=float, nargs="+", default=[16.0, 64.0, 512.0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    become_ranks(args.ranks)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for bucket_mb in args.bucket_mb:
        measure(args.model, args.engine, bucket_mb, args.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
