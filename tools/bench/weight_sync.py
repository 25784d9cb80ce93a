"""Bandwidth of a weight sync into an engine, against a memcpy of the same bytes, and against one call a parameter.

    python tools/bench/weight_sync.py --model smollm2 --bucket-mb 16 64 512
    .nox/vllm_integration/bin/python tools/bench/weight_sync.py --engine vllm
    PYTHONPATH=packages/lightrft-engines/tests/sglang_on_cpu .nox/sglang/bin/python tools/bench/weight_sync.py \
        --engine sglang

One rank: buckets are views of a model in memory, so what is measured is the engine's part (checks, ledger, copies).
Extra memory is what this process's resident size rises by in a sync.
``memcpy`` copies as many bytes between two buffers of each tensor's size. ``singly`` sends the same tensors through the
engine's own interface one a call: vLLM's ``load_weights`` with one tensor, for the others a bucket of one tensor.
Rounds alternate between the three.
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
from resident import resident_rise
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lightrft.strategy.device import local_device
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.registry import load_plugin
from lightrft.strategy.weights import TensorSpec, UpdatePlan, WeightBucket, plan_buckets, sample_positions

log = logging.getLogger("bench.weight_sync")
Export = Callable[[UpdatePlan], Iterator[WeightBucket]]


@dataclass(frozen=True)
class Result:
    """Seconds (medians) of one sync, of one copy of the same bytes and of one call a tensor; and bytes."""

    sync: float
    memcpy: float
    singly: float
    nbytes: int
    buckets: int
    rise: int

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
    whole = UpdatePlan(version=0, specs=tuple(specs), bucket_bytes=2**40)
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
    device = local_device()
    pairs = [
        (torch.ones(s.numel, dtype=s.dtype, device=device), torch.zeros(s.numel, dtype=s.dtype, device=device))
        for s in specs
    ]

    def memcpy() -> None:
        for source, target in pairs:
            target.copy_(source)

    def singly() -> None:
        state = {name: tensor for bucket in export(whole) for name, tensor in bucket.tensors.items()}
        if engine.name == "vllm":
            from lightrft.engines.vllm import backend

            load: Any = backend.model(engine._llm).load_weights  # type: ignore[attr-defined]
            for name, tensor in state.items():
                load([(name, tensor)])
            return
        engine.begin_update(engine.status().version + 1, specs, bucket_bytes=bucket_bytes)
        for number, (name, tensor) in enumerate(state.items()):
            engine.load_bucket(WeightBucket(number, {name: tensor}))
        engine.finish_update()

    other = reference or memcpy
    other()
    singly()
    rise = resident_rise(sync)
    times = [(timed(sync), timed(other), timed(singly)) for _ in range(rounds)]
    mine, copied, single = (statistics.median(column) for column in zip(*times, strict=True))
    return Result(mine, copied, single, sent[0], sent[1], rise)


def main() -> None:
    """Read the arguments and measure each bucket size."""
    parser = argparse.ArgumentParser(description="bandwidth of a weight sync into an engine")
    parser.add_argument("--engine", default="hf")
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
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).to(local_device())
    engine: RolloutEngine = load_plugin("engines", args.engine)()
    extra = {"kv_cache_memory_bytes": 64 * 2**20} if args.engine == "vllm" else {}
    begun = time.perf_counter()
    engine.start(EngineSpec(model_config=config, dtype=dtype, device=local_device(), max_model_len=64, extra=extra))
    log.info("engine started without weights in %.3f s", time.perf_counter() - begun)
    specs, export = views_of(model)
    for bucket_mb in args.bucket_mb:
        r = measure(engine, specs, export, bucket_bytes=int(bucket_mb * 2**20), rounds=args.rounds)
        log.info(
            "%s %s, %d tensors, %.1f MiB in %d buckets of at most %g MiB, %d thread(s): sync %.1f ms (%.2f GB/s), "
            "memcpy %.1f ms (%.2f GB/s), share %.2f; one tensor a call %.1f ms (%.2f ×); extra memory %.1f MiB",
            *(f"{args.engine} {args.model}", args.dtype, len(specs)),
            *(r.nbytes / 2**20, r.buckets, bucket_mb, torch.get_num_threads()),
            *(r.sync * 1e3, r.nbytes / r.sync / 1e9, r.memcpy * 1e3, r.nbytes / r.memcpy / 1e9, r.share),
            *(r.singly * 1e3, r.singly / r.sync, r.rise / 2**20),
        )
    engine.shutdown()


if __name__ == "__main__":
    main()
