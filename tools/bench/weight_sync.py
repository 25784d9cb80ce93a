"""Bandwidth of a weight sync into the embedded engine, against a memcpy of the same bytes.

    python tools/bench/weight_sync.py --model smollm2 --bucket-mb 16 64 512

One rank: buckets are views of a model in memory, so what is measured is the engine's part (checks, ledger, copies).
``memcpy`` copies as many bytes between two buffers of each tensor's size. Rounds alternate between the two.
A two-rank measurement belongs to a sharded strategy: it calls :func:`measure` with its own ``export``.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hf_engine import MODELS, timed
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lightrft.engines.hf import HFEngine
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import TensorSpec, UpdatePlan, WeightBucket, plan_buckets, sample_positions

log = logging.getLogger("bench.weight_sync")
Export = Callable[[UpdatePlan], Iterator[WeightBucket]]


@dataclass(frozen=True)
class Result:
    """Seconds of one sync and of one copy of the same bytes (medians), and the bytes."""

    sync: float
    memcpy: float
    nbytes: int
    buckets: int

    @property
    def share(self) -> float:
        """The sync's bandwidth as a share of memcpy's."""
        return self.memcpy / self.sync


def views_of(model: Any) -> tuple[list[TensorSpec], Export]:
    """What a strategy on one rank exports: specs, and buckets of views."""
    layout, sources = HubLayout(model), dict(hub_sources(model))
    state = {name: tensor.view(sources[tensor.source].detach()) for name, tensor in layout.by_name.items()}

    def export(plan: UpdatePlan) -> Iterator[WeightBucket]:
        for index, group in enumerate(plan_buckets(plan)):
            yield WeightBucket(index, {spec.name: state[spec.name].to(spec.dtype) for spec in group})

    return layout.specs, export


def measure(
    engine: RolloutEngine,
    specs: Sequence[TensorSpec],
    export: Export,
    *,
    bucket_bytes: int,
    rounds: int,
    reference: Callable[[], Any] | None = None,
    verify: bool = True,
) -> Result:
    """Time whole updates; ``reference`` is what they are compared with (default: a memcpy of the engine's bytes)."""
    sent: list[int] = []

    def sync() -> None:
        version = engine.status().version + 1
        plan = engine.begin_update(version, specs, bucket_bytes=bucket_bytes)
        for bucket in export(plan):
            engine.load_bucket(bucket)
        if verify:
            engine.sample_weights({spec.name: sample_positions(spec.numel) for spec in plan.specs})
        receipt = engine.finish_update()
        sent[:] = [receipt.nbytes, receipt.buckets]

    sync()
    pairs = [(torch.ones(s.numel, dtype=s.dtype), torch.zeros(s.numel, dtype=s.dtype)) for s in specs]

    def memcpy() -> None:
        for source, target in pairs:
            target.copy_(source)

    other = reference or memcpy
    other()
    times = [(timed(sync), timed(other)) for _ in range(rounds)]
    mine, copied = (statistics.median(column) for column in zip(*times, strict=True))
    return Result(mine, copied, sent[0], sent[1])


def main() -> None:
    """Read the arguments and measure each bucket size."""
    parser = argparse.ArgumentParser(description="bandwidth of a weight sync into the embedded engine")
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--bucket-mb", type=float, nargs="+", default=[16.0, 64.0, 512.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    transformers_logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    config, dtype = MODELS[args.model](), getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    engine = HFEngine()
    begun = time.perf_counter()
    engine.start(EngineSpec(model_config=config, dtype=dtype))
    log.info("engine started without weights in %.3f s", time.perf_counter() - begun)
    specs, export = views_of(model)
    for bucket_mb in args.bucket_mb:
        r = measure(engine, specs, export, bucket_bytes=int(bucket_mb * 2**20), rounds=args.rounds)
        log.info(
            "%s %s, %d tensors, %.1f MiB in %d buckets of at most %g MiB, %d thread(s): sync %.1f ms (%.2f GB/s), "
            "memcpy %.1f ms (%.2f GB/s), share %.2f",
            *(args.model, args.dtype, len(specs), r.nbytes / 2**20, r.buckets, bucket_mb, torch.get_num_threads()),
            *(r.sync * 1e3, r.nbytes / r.sync / 1e9, r.memcpy * 1e3, r.nbytes / r.memcpy / 1e9, r.share),
        )


if __name__ == "__main__":
    main()
