"""Step time and peak memory of a rank: FSDP2 against ZeRO 1, 2 and 3, one model, two ranks.

    python tools/bench/backends.py --model smollm2

Every backend trains the same weights on the same rows, in fresh processes, one thread a rank, fp32. Steps are timed
after two that warm up. Peak memory is the highest resident size of a rank during the timed steps, less what it held
before the model was made (Linux; what the libraries themselves take is left out). Seconds a step are the median of all
rounds; the backends take turns, so that whatever else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from hf_engine import MODELS
from launch_ranks import rank_environment
from strategy_step import BACKENDS, MAX_NORM, build, loss_of

from lightrft.strategy import get_strategy

log = logging.getLogger("bench.backends")
MIB = 2**20
WARM_UP = 2


def reset_peak() -> None:
    """Let the kernel forget this process's highest resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The highest resident size since then."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def train(name: str, backend: str, steps: int, rows: int, length: int) -> None:
    """Be a rank: train, and let rank 0 write the figures as one line of JSON."""
    dist.init_process_group("gloo")
    settings = {"max_norm": MAX_NORM, "micro_train_batch_size": rows, "train_batch_size": rows * dist.get_world_size()}
    strategy = get_strategy({**settings, **BACKENDS[backend]})
    strategy.setup_distributed()
    before = psutil.Process().memory_info().rss
    model = strategy.prepare(build(name))
    optimizer = strategy.create_optimizer(model, lr=1e-4)
    seconds, vocabulary = [], MODELS[name]().vocab_size
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            gc.collect()
            reset_peak()
        ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(number))
        dist.barrier()
        begun = time.perf_counter()
        strategy.backward(loss_of(model, ids), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)
        dist.barrier()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - begun)
    peak = strategy.all_reduce(peak_bytes() - before, "max")
    if strategy.is_rank_0():
        sys.stdout.write(json.dumps({"seconds": seconds, "peak": peak}) + "\n")
    dist.destroy_process_group()


def measure(name: str, backend: str, args: argparse.Namespace) -> dict[str, object]:
    """Start the ranks of one backend and read what they found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    command += [__file__, "--model", name, "--as-rank", backend, "--steps", str(args.steps)]
    command += ["--rows", str(args.rows), "--length", str(args.length)]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{backend}: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=2, help="How often each backend takes its turn.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2, help="Rows of a rank's micro-batch.")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--as-rank", metavar="BACKEND", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        torch.set_num_threads(1)
        train(args.model, args.as_rank, args.steps, args.rows, args.length)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    found: dict[str, list[dict]] = {backend: [] for backend in args.backend}
    for _ in range(args.rounds):
        for backend in args.backend:
            found[backend].append(measure(args.model, backend, args))
    title = f"{args.model}, {args.ranks} ranks, {args.rows} × {args.length} tokens each"
    log.info("| %s | seconds a step | peak memory a rank |", title)
    log.info("|---|---|---|")
    for backend, runs in found.items():
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        log.info("| %s | %.2f | %.0f MiB |", backend, seconds, max(run["peak"] for run in runs) / MIB)


if __name__ == "__main__":
    main()
