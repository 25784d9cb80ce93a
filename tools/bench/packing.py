"""Tokens per second with and without ``--packing_samples``, on samples whose lengths are drawn from a log-normal.

    python tools/bench/packing.py --order drawn sorted
    python tools/bench/packing.py --device cuda --dtype bfloat16 --width 1536 --layers 16     # and --flash_attn

A step is forward and backward of an actor over micro-batches of the same samples, padded or packed; a quarter of each
is prompt, of which no logits are made. *drawn* takes the samples as they come, *sorted* by length, as the trainer
does to keep padding low. The fill ratio is the share of the padded rows that is tokens: packed, a step should take
that share of the time. *packed* has the same micro-batches; *by tokens* has micro-batches of at most as many tokens as
the largest padded one has positions, as with ``--max_tokens_per_micro_batch``: the same memory. Turns alternate, so
that whatever else the machine does meets all alike; the speed-up is the median over the turns.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time

import torch
from transformers import Qwen2Config

from lightrft.models import Actor, TokenRows, pad_rows

log = logging.getLogger("bench.packing")
MEDIAN, SPREAD, SHORTEST, LONGEST = 128, 0.8, 16, 2048
VOCABULARY = 8192


def build(args: argparse.Namespace) -> Actor:
    """An actor whose layers are most of it."""
    torch.manual_seed(0)
    actor = Actor(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 64,
            num_key_value_heads=args.width // 128,
            max_position_embeddings=LONGEST,
        ),
        dtype=getattr(torch, args.dtype),
        use_flash_attention_2=args.flash_attn,
    )
    return actor.to(args.device)


def draw(samples: int, seed: int) -> list[int]:
    """Lengths of samples."""
    normal = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return (MEDIAN * (SPREAD * normal).exp()).round().int().clamp(SHORTEST, LONGEST).tolist()


def batches_of(lengths: list[int], device: str, *, samples: int = 0, tokens: int = 0) -> list[TokenRows]:
    """Micro-batches of ``samples``, or of at most ``tokens``, in order."""
    generator = torch.Generator().manual_seed(0)
    parts: list[list[list[int]]] = [[]]
    for length in lengths:
        if len(parts[-1]) == samples if samples else sum(map(len, parts[-1])) + length > tokens:
            parts.append([])
        parts[-1].append(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
    halves = [([row[: len(row) // 4] for row in part], [row[len(row) // 4 :] for row in part]) for part in parts]
    return [pad_rows(*pair, pad_token_id=0, device=torch.device(device)) for pair in halves]


def step(actor: Actor, batches: list[TokenRows]) -> tuple[float, float]:
    """Seconds of forward and backward over all micro-batches, and the sum of the logprobs."""
    total, begun = 0.0, time.perf_counter()
    for rows in batches:
        logprobs = actor(rows.sequences, rows.attention_mask, rows.response_mask)
        logprobs.sum().backward()
        total += logprobs.sum().item()
    if batches[0].sequences.device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - begun
    actor.zero_grad()
    return seconds, total


def compare(order: str, lengths: list[int], args: argparse.Namespace) -> None:
    """Take turns and log a line."""
    lengths = sorted(lengths) if order == "sorted" else lengths
    batches = batches_of(lengths, args.device, samples=args.size)
    positions = [rows.sequences.numel() for rows in batches]
    fill = sum(lengths) / sum(positions)
    padded = build(args)
    packed = Actor(copy.deepcopy(padded.model), packing_samples=True)
    for actor in (padded, packed):
        actor.shares_prompts = False  # that layout has no padding either
    ways = {
        "padded": (padded, batches),
        "packed": (packed, batches),
        "by tokens": (packed, batches_of(lengths, args.device, tokens=max(positions))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns + 1):
        totals = {}
        for name, way in ways.items():
            taken, totals[name] = step(*way)
            if turn:  # the first warms up
                seconds[name].append(taken)
        rounding = 1e-5 if args.dtype == "float32" else 1e-2
        if max(totals.values()) - min(totals.values()) > rounding * abs(totals["padded"]):
            raise SystemExit(f"they part: {totals}")
    log.info("%s: fill ratio %.2f, micro-batches of up to %d positions", order, fill, max(positions))
    for name, found in seconds.items():
        gain = statistics.median(a / b for a, b in zip(seconds["padded"], found, strict=True))
        log.info(
            "%-10s %7.0f tokens/s: %.2f × padded, %.2f × (1 / fill) × padded",
            *(name, sum(lengths) / statistics.median(found), gain, gain * fill),
        )


def main() -> None:
    """Compare in each order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--order", nargs="+", choices=("drawn", "sorted"), default=["drawn", "sorted"])
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator as torch names it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--flash_attn", action="store_true", help="attend with flash attention's kernels")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=16, help="Samples of a micro-batch.")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(args.threads)
    lengths = draw(args.samples, args.seed)
    log.info("%d samples of %d to %d tokens, %d a micro-batch", len(lengths), min(lengths), max(lengths), args.size)
    for order in args.order:
        compare(order, lengths, args)


if __name__ == "__main__":
    main()
