"""Token logprobs, forward and backward: fused (``--fused_linear_logprob``) against plain torch and the peers.

    python tools/bench/fused_logprob.py
    uv run --no-sync --with trl==1.16.0 --with liger-kernel python tools/bench/fused_logprob.py --grow
    uv run --no-sync --with liger-kernel --with cut-cross-entropy python tools/bench/fused_logprob.py --device cuda \
        --dtype bfloat16 --width 4096 --vocabulary 131072

On a CPU each way runs in a process of its own, so that its peak memory is its own; the ways take turns, so that
whatever else the machine does meets all alike. Printed are the medians of the seconds by the clock on the wall (with
``--processor``, on a busy machine: of the processor, all threads together), the ratio of each turn's seconds to plain
torch's, and what the peak of the process's memory (of the accelerator's allocator) rose by.

plain: ``log_softmax`` of the logits. chunked: the same in slices of 1024 tokens with logits recomputed in the backward
pass (``torch.utils.checkpoint``), as several trainers do. selective: TRL's selective_log_softmax. trl_chunked: TRL's
ChunkedLogProbFunction over 4096 entries of the vocabulary at a time. liger: its chunked GRPO loss without compiling,
which gives a loss rather than logprobs. On an accelerator alone, as Triton kernels that give no entropies: liger_ce,
Liger's fused linear cross entropy of each token; cut, cut cross entropy (arXiv:2411.09009) with every gradient.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightrft.models.fused_logprob import fused_token_statistics

log = logging.getLogger("bench.fused_logprob")
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What PyTorch does."""
    return (hidden @ weight.t()).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours."""
    return fused_token_statistics(hidden, weight, None, labels, chunk_size=CHUNK)[0]


def fused_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours with the entropies, which the others do not give."""
    logprobs, entropies = fused_token_statistics(hidden, weight, None, labels, with_entropy=True, chunk_size=CHUNK)
    assert entropies is not None
    return logprobs + entropies


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Slices of tokens, recomputed."""
    parts = zip(hidden.split(1024), labels.split(1024), strict=True)
    return torch.cat([checkpoint(plain, part, weight, chosen, use_reentrant=False) for part, chosen in parts])


def selective(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's."""
    from trl.trainer.utils import selective_log_softmax  # pyright: ignore[reportMissingImports]

    return selective_log_softmax(hidden @ weight.t(), labels)


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's, in tiles of the logits; its trainers take tiles of 4096 tokens × 32768, which here were all of them."""
    from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 4096, None, 1.0, ())[0]


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's chunked GRPO loss, for which every row of 256 tokens is a sample."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=1)
    rows = labels.view(-1, 256)
    advantages = torch.ones(len(rows), device=hidden.device)
    output = loss(hidden.view(len(rows), 256, -1), weight, rows, torch.ones_like(rows), advantages, None)
    return (output[0] if isinstance(output, tuple) else output).reshape(1)


def liger_ce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, token by token."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, labels)


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cut cross entropy, every gradient included."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None)


WAYS: dict[str, tuple[Way, str]] = {
    "plain": (plain, "torch"),
    "fused": (fused, "torch"),
    "fused_entropy": (fused_entropy, "torch"),
    "chunked": (chunked, "torch"),
    "selective": (selective, "trl"),
    "trl_chunked": (trl_chunked, "trl"),
    "liger": (liger, "liger_kernel"),
    "liger_ce": (liger_ce, "liger_kernel"),
    "cut": (cut, "cut_cross_entropy"),
}
ON_ACCELERATORS = ("liger_ce", "cut")
CHUNK = 4096


def measure(name: str, args: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each round and MiB by which the process's peak rose, in this process."""
    torch.set_num_threads(args.threads)
    tokens, width, vocabulary = args.tokens, args.width, args.vocabulary
    clock = time.process_time if args.processor else time.perf_counter
    generator = torch.Generator(args.device).manual_seed(0)
    given: dict[str, Any] = {"generator": generator, "device": args.device}
    kind = getattr(torch, args.dtype)
    hidden = torch.randn(tokens, width, **given).to(kind).requires_grad_()
    weight = (torch.randn(vocabulary, width, **given) * 0.05).to(kind).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), **given)
    way = WAYS[name][0]
    # Threads and libraries have started after these; kernels are compiled for the shapes that are measured.
    few = (hidden, weight, labels)
    if args.device == "cpu":
        few = torch.randn(256, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True), labels[:256] % 64
    way(*few).sum().backward()
    hidden.grad = weight.grad = None
    synchronize(args.device)
    before, seconds = peak(args.device, begin=True), []
    for _ in range(args.rounds):
        begun = clock()
        way(hidden, weight, labels).sum().backward()
        synchronize(args.device)
        seconds.append(clock() - begun)
        hidden.grad = weight.grad = None
    return seconds, peak(args.device) - before


def synchronize(device: str) -> None:
    """Wait for what was started on an accelerator."""
    if device != "cpu":
        torch.accelerator.synchronize()


def peak(device: str, *, begin: bool = False) -> float:
    """The most memory that this process has held, or that the accelerator's allocator has since ``begin``, in MiB."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if begin:
        torch.accelerator.reset_peak_memory_stats()
    return torch.accelerator.max_memory_allocated() / 2**20


def compare(names: list[str], turns: int, args: argparse.Namespace) -> None:
    """Run each way ``turns`` times in turn and log a line for each."""
    shape = ("tokens", "vocabulary", "width", "dtype", "chunk_size", "rounds", "threads")
    flags = [word for name in shape for word in (f"--{name}", str(getattr(args, name)))]
    flags += ["--processor"] * args.processor
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    for _ in range(turns):
        for name in names:
            if args.device != "cpu":  # its allocator counts for each way alone
                found, memory[name] = measure(name, args)
            else:
                command = [sys.executable, __file__, "--only", name, *flags]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                found, memory[name] = json.loads(answer)
            seconds[name].append(min(found))
    for name in names:
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[names[0]], strict=True)]
        log.info(
            "%-14s %8.4f s  %5.2f × plain  %6.0f MiB extra",
            *(name, statistics.median(seconds[name]), statistics.median(ratios), memory[name]),
        )


def main() -> None:
    """Compare the ways at one shape, or at growing ones."""
    global CHUNK
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator as torch names it")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk_size", type=int, default=CHUNK)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="count the processor's seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--grow", action="store_true", help="also twice and four times the tokens and the vocabulary")
    parser.add_argument("--only", choices=WAYS, help="measure one way in this process and print JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    CHUNK = args.chunk_size
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))  # freed blocks go back, so that a peak is a peak
    names = [name for name, (_, library) in WAYS.items() if importlib.util.find_spec(library) is not None]
    names = [name for name in names if args.device != "cpu" or name not in ON_ACCELERATORS]
    shapes = [(args.tokens, args.vocabulary)]
    if args.grow:
        shapes += [(args.tokens * k, args.vocabulary) for k in (2, 4)]
        shapes += [(args.tokens, args.vocabulary * k) for k in (2, 4)]
    for place, (tokens, vocabulary) in enumerate(shapes):
        log.info(
            "N=%d H=%d V=%d %s on %s, chunk %d, %d threads",
            *(tokens, args.width, vocabulary, args.dtype, args.device, CHUNK, args.threads),
        )
        shaped = argparse.Namespace(**{**vars(args), "tokens": tokens, "vocabulary": vocabulary})
        compare(names if place == 0 else ["plain", "fused"], args.turns if place == 0 else 1, shaped)


if __name__ == "__main__":
    main()
