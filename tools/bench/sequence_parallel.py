"""A step on one long sequence: cut over two ranks (``--sp_size 2``) against whole on one rank with as many threads.

    python tools/bench/sequence_parallel.py --lengths 1024 2048 4096 8192 16384

Both are ``FSDPV2Strategy`` steps on the same model and tokens, one thread a rank, fp32, ``--fused_linear_logprob``,
without gradient checkpointing. Each is measured in fresh processes, in turns. *Activations* is what a rank's resident
size rises by during the forward pass (Linux): what is kept for the backward pass and what is held on the way. *Saved*
counts the bytes that autograd keeps, each storage once, the parameters left out. Seconds are medians over the timed
steps.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from backends import MIB, peak_bytes, reset_peak
from launch_ranks import rank_environment
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config

from lightrft.models import Actor
from lightrft.strategy import get_strategy

log = logging.getLogger("bench.sequence_parallel")
VOCABULARY = 8192


class Saved:
    """Counts the bytes of the storages that autograd keeps for the backward pass, while ``hooks`` are open."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        # A layer's parameters are whole tensors just while it computes.
        whole = [p for p in self.model.parameters() if not isinstance(p, DTensor)]
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in whole}:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def train(length: int, steps: int) -> dict[str, Any]:
    """Be a rank: take steps on one sequence and say what they took."""
    ranks = dist.get_world_size()
    strategy = get_strategy(
        {"fsdp": True, "sp_size": ranks, "micro_train_batch_size": 1, "train_batch_size": 1, "engine_type": "hf"}
    )
    strategy.setup_distributed()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=length,
    )
    model = Actor(config, sequence_group=strategy.sequence_group, fused_linear_logprob=True)
    actor = strategy.prepare(model)
    optimizer = strategy.create_optimizer(actor, lr=1e-4)
    tokens = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    seconds, rise, saved, losses = [], 0, 0, []
    final = steps + 1 if steps else 0
    for number in range(final + 1):  # the first warms up, the last measures memory
        last = number == final
        gc.collect()
        dist.barrier()
        reset_peak()
        before, begun = psutil.Process().memory_info().rss, time.perf_counter()
        kept = Saved(model)
        with kept.hooks if last else contextlib.nullcontext():
            loss = -actor(tokens).sum() / length
        losses.append(loss.item())
        if last:
            rise, saved = peak_bytes() - before, kept.bytes
            break
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, None)
        dist.barrier()
        if number:
            seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds, "rise": strategy.all_reduce(rise, "max"), "saved": saved, "losses": losses}


def measure(ranks: int, length: int, steps: int) -> dict[str, Any]:
    """Start the ranks and read what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--as-rank", "--lengths", str(length), "--steps", str(steps)]
    environment = {**rank_environment(), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks, {length} tokens: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(length: int, steps: int, rounds: int) -> None:
    """Take turns and log a row of the table."""
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(rounds):
        for ranks, runs in found.items():
            runs.append(measure(ranks, length, steps))
    losses = torch.tensor([found[ranks][0]["losses"] for ranks in (1, 2)])
    if (losses[0] - losses[1]).abs().max() > 1e-4:
        raise SystemExit(f"{length} tokens: the losses part: {losses.tolist()}")
    taken = "not timed"
    if steps:
        one, two = (statistics.median(second for run in runs for second in run["seconds"]) for runs in found.values())
        taken = f"{one:.2f} → {two:.2f} s, {two / one:.2f} ×"
    rise, saved = ([max(run[what] for run in runs) / MIB for runs in found.values()] for what in ("rise", "saved"))
    log.info(
        "| %d | %s | %.0f → %.0f MiB, %.2f × | %.0f → %.0f MiB, %.2f × |",
        *(length, taken, *rise, rise[1] / rise[0], *saved, saved[1] / saved[0]),
    )


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--steps", type=int, default=3, help="Timed steps; 0 measures memory alone.")
    parser.add_argument("--rounds", type=int, default=1, help="How often each takes its turn.")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if args.as_rank:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        figures = train(args.lengths[0], args.steps)
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps(figures) + "\n")
        dist.destroy_process_group()
        return
    log.info("| tokens | a step | activations a rank | saved for the backward pass |")
    log.info("|---|---|---|---|")
    for length in args.lengths:
        compare(length, args.steps, args.rounds)


if __name__ == "__main__":
    main()
