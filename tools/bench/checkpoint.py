"""Saving and loading through a strategy against raw DCP and raw DeepSpeed, on the same trained model and two ranks.

    python tools/bench/checkpoint.py --model smollm2 --backend fsdp zero2 zero3

Raw is what one writes without a strategy: ``dcp.save`` of torch's state dicts, or ``engine.save_checkpoint``, and then
an fsync of what each rank wrote, without which nothing is kept; ``dcp.load`` or ``engine.load_checkpoint``. Ours also
digests what it writes, verifies what it reads, and swaps the finished folder in. Model, Adam's moments and step are the
same objects on both sides, after two training steps. The two take turns, so that whatever else the machine does meets
them alike; ratios are medians of each round's. An asynchronous save blocks training for the time that ``save_ckpt`` and
the calls of ``finish_checkpoint`` take, while the writer has the machine for itself in between.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hf_engine import MODELS
from launch_ranks import become_ranks
from strategy_step import ADAM, BACKENDS, ROWS, build, loss_of, shard
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lightrft.strategy import get_strategy

log = logging.getLogger("bench.checkpoint")
POLL_SECONDS = 0.25


class Ours:
    """A strategy with a model that it has trained."""

    def __init__(self, name: str, backend: str) -> None:
        ranks = dist.get_world_size()
        settings = {"micro_train_batch_size": ROWS, "train_batch_size": ROWS * ranks, **BACKENDS[backend]}
        self.strategy = get_strategy(settings)
        self.model: Any = self.strategy.prepare(build(name))
        self.optimizer = self.strategy.create_optimizer(self.model, lr=ADAM["lr"])
        for number in range(2):
            generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
            rows = torch.randint(3, MODELS[name]().vocab_size, (ROWS, 32), generator=generator)
            self.strategy.backward(loss_of(self.model, rows), self.model, self.optimizer)
            self.strategy.optimizer_step(self.optimizer, self.model, None)

    def save(self, folder: Path, *, asynchronous: bool = False) -> None:
        self.strategy.save_ckpt(self.model, folder, tag="one", asynchronous=asynchronous)

    def load(self, folder: Path) -> None:
        self.strategy.load_ckpt(self.model, folder, tag="one")

    def finish(self, *, block: bool) -> bool:
        return self.strategy.finish_checkpoint(block=block)


def raw_dcp(name: str) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Save and load as the DCP tutorial has them, of a raw loop's model and AdamW; its writer flushes each file."""
    model = shard(build(name))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    loss_of(model, torch.full((ROWS, 32), 3)).backward()
    optimizer.step()

    def save(folder: Path) -> None:
        weights, optim = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": optim}, storage_writer=dcp.FileSystemWriter(folder))

    def load(folder: Path) -> None:
        weights, optim = get_state_dict(model, optimizer)
        state = {"model": weights, "optim": optim}
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])

    return save, load


def raw_deepspeed(ours: Ours) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Save and load as the DeepSpeed tutorial has them; what a rank wrote, it flushes."""
    engine = ours.model.engine

    def save(folder: Path) -> None:
        engine.save_checkpoint(str(folder), tag="one")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files[dist.get_rank() :: dist.get_world_size()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        dist.barrier()

    def load(folder: Path) -> None:
        engine.load_checkpoint(str(folder), tag="one")

    return save, load


def timed(act: Callable[..., Any], folder: Path, **options: bool) -> float:
    """Seconds until every rank is done."""
    dist.barrier()
    begun = time.perf_counter()
    act(folder, **options)
    dist.barrier()
    return time.perf_counter() - begun


def blocked(ours: Ours, folder: Path) -> float:
    """Seconds for which an asynchronous save keeps this rank from training."""
    seconds = timed(ours.save, folder, asynchronous=True)
    done = False
    while not done:
        time.sleep(POLL_SECONDS)
        begun = time.perf_counter()
        done = ours.finish(block=False)
        seconds += time.perf_counter() - begun
    return seconds


def measure(name: str, backend: str, rounds: int, scratch: Path) -> None:
    """Let both sides save and load in turn, and log what came of it, on rank 0."""
    ours = Ours(name, backend)
    raw_save, raw_load = raw_dcp(name) if backend == "fsdp" else raw_deepspeed(ours)
    sides = {"ours": (ours.save, ours.load), "raw": (raw_save, raw_load)}
    seconds: dict[str, list[float]] = {}
    nbytes = 0
    for number in range(-1, rounds):  # the first round warms up
        found: dict[str, float] = {}
        order = list(sides) if number % 2 else list(reversed(sides))
        folders = {side: scratch / f"{backend}-{side}" for side in order}
        for side in order:
            found[f"{side} save"] = timed(sides[side][0], folders[side])
        for side in order:
            found[f"{side} load"] = timed(sides[side][1], folders[side])
        found["blocked"] = blocked(ours, scratch / f"{backend}-background")
        nbytes = sum(path.stat().st_size for path in folders["ours"].rglob("*") if path.is_file())
        dist.barrier()
        if dist.get_rank() == 0:
            for folder in scratch.iterdir():
                shutil.rmtree(folder)
        dist.barrier()
        if number >= 0:
            for key, value in found.items():
                seconds.setdefault(key, []).append(value)
    if dist.get_rank() == 0:
        log.info("%s, %s, %.0f MB, %d rounds:", name, backend, nbytes / 1e6, rounds)
        for title, mine, theirs in (
            ("save", "ours save", "raw save"),
            ("load", "ours load", "raw load"),
            ("asynchronous save, blocked, against ours", "blocked", "ours save"),
        ):
            ratio = statistics.median(a / b for a, b in zip(seconds[mine], seconds[theirs], strict=True))
            medians = statistics.median(seconds[mine]), statistics.median(seconds[theirs])
            log.info("  %s: %.2f against %.2f s: %.2f ×", title, *medians, ratio)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["fsdp", "zero2", "zero3"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="Where to write; default: the system's temporary folder.")
    args = parser.parse_args()
    become_ranks(args.ranks)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory(dir=args.folder) as mine:
        everyone: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for backend in args.backend:
            measure(args.model, backend, args.rounds, Path(everyone[0]))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
