"""Memory and seconds of a conversion in each direction, beside DeepSpeed's ``zero_to_fp32``.

    python tools/bench/convert.py

A model of SmolLM2's shape is trained for two steps under ZeRO 2 on two ranks, then saved by the strategy and by
``engine.save_checkpoint``. Each conversion has a process of its own; its peak is what the system counted for it
(``ru_maxrss``), beside that of a process which imports as much and converts nothing. What lies above is compared with
the largest tensor. Seconds are of the whole process; in brackets, of the conversion alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint import Ours
from hf_engine import MODELS
from launch_ranks import ranks_command
from strategy_step import build

log = logging.getLogger("bench.convert")
NOTHING = "import torch, transformers; import lightrft.strategy.conversion, lightrft.strategy.dcp_files{deepspeed}"
CONVERT = """{imports}
print(lightrft.strategy.conversion.convert({source!r}, {target!r}, to={to!r}, pretrain={pretrain!r}).seconds)"""
ZERO_TO_FP32 = """import time
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
begun = time.monotonic()
convert_zero_checkpoint_to_fp32_state_dict({source!r}, {target!r}, safe_serialization=False)  # tied weights
print(time.monotonic() - begun)"""
# A process's peak begins with that of the one that started it: this one is small.
STARTER = """import os, subprocess, sys, time
begun = time.monotonic()
process = subprocess.Popen([sys.executable, "-P", "-c", sys.argv[1]])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss, time.monotonic() - begun)
sys.exit(os.waitstatus_to_exitcode(status))"""
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
# What is read, what is made of it, and where the result lies.
DIRECTIONS = (
    ("deepspeed", "hf", "from_deepspeed"),
    ("deepspeed", "ds", "from_deepspeed_ds"),
    ("deepspeed", "fsdp", "from_deepspeed_fsdp"),
    ("ds", "hf", "from_ds"),
    ("ds", "fsdp", "fsdp"),
    ("fsdp", "hf", "from_fsdp"),
    ("fsdp", "ds", "from_fsdp_ds"),
    ("hub", "ds", "from_hub_ds"),
    ("hub", "fsdp", "from_hub_fsdp"),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one process. :param alone: seconds of the conversion alone, as the process says."""

    peak: int
    seconds: float
    alone: float


def cost_of(code: str) -> Cost:
    """Run ``code`` in an interpreter of its own; the last word that it prints is ``alone``.

    :raises RuntimeError: it failed; with its last words.
    """
    done = subprocess.run([sys.executable, "-c", STARTER, code], capture_output=True, text=True, check=False)
    *said, last = done.stdout.splitlines() or [""]
    if done.returncode:
        raise RuntimeError(f"{code}\n{done.stderr[-2000:]}")
    peak, seconds = last.split()
    return Cost(peak=int(peak) * RSS_UNIT, seconds=float(seconds), alone=float(said[-1].split()[-1]))


def prepare(name: str, folder: Path) -> None:
    """What is converted, written by two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ours = Ours(name, "zero2")
    ours.strategy.save_ckpt(ours.model, folder, tag="ds")
    ours.model.engine.save_checkpoint(str(folder / "deepspeed"), tag="one")
    if dist.get_rank() == 0:
        build(name).save_pretrained(folder / "hub")
    dist.barrier()
    dist.destroy_process_group()


def measure(name: str, folder: Path, rounds: int) -> None:
    """Convert in each direction, and log the medians of ``rounds``."""
    largest = max(tensor.nbytes for tensor in build(name).state_dict().values())
    log.info("%s, largest tensor %.0f MiB, %d rounds:", name, largest / 2**20, rounds)
    idle: dict[str, int] = {}
    for source, to, target in DIRECTIONS:
        imports = NOTHING.format(deepspeed=", lightrft.deepspeed.strategy" if source == "deepspeed" else "")
        if imports not in idle:
            idle[imports] = cost_of(f"{imports}\nprint(0)").peak
        where = {"source": str(folder / source), "target": str(folder / target)}
        code = CONVERT.format(imports=imports, **where, to=to, pretrain=str(folder / "hub"))
        costs = [_once(code, folder / target, number) for number in range(rounds)]
        _report(f"{source} to {to}", costs, idle[imports], largest)
    imports = "import deepspeed.utils.zero_to_fp32\nprint(0)"
    where = {"source": str(folder / "deepspeed"), "target": str(folder / "zero_to_fp32")}
    costs = [_once(ZERO_TO_FP32.format(**where), folder / "zero_to_fp32", number) for number in range(rounds)]
    _report("DeepSpeed's zero_to_fp32", costs, cost_of(imports).peak, largest)


def _once(code: str, target: Path, number: int) -> Cost:
    if number:
        shutil.rmtree(target)
    return cost_of(code)


def _report(title: str, costs: list[Cost], idle: int, largest: int) -> None:
    peak = statistics.median(cost.peak for cost in costs)
    seconds, alone = (statistics.median(getattr(cost, key) for cost in costs) for key in ("seconds", "alone"))
    above = (peak - idle) / largest
    log.info(
        "  %s: %.0f MiB, %.0f above %.0f idle (%.2f × the largest tensor); %.1f s (%.1f)",
        *(title, peak / 2**20, (peak - idle) / 2**20, idle / 2**20, above, seconds, alone),
    )


def main() -> None:
    """Write what is converted on two ranks, then convert it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="Where to write; default: the system's temporary folder.")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    if "RANK" in os.environ:
        prepare(args.model, Path(args.folder))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        words, environment = ranks_command(2)
        subprocess.run([*words, "--folder", folder], env=environment, check=True)
        measure(args.model, Path(folder), args.rounds)


if __name__ == "__main__":
    main()
