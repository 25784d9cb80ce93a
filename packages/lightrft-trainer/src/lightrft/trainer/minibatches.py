"""The samples of each optimizer step, and how each rank splits its share into micro-batches.

Pure functions of (seed, step, epoch) and of the samples' global indices, so that the same samples are in the same
optimizer step on any number of ranks, and after a resume.

Global sample indices count within a rollout step: prompt at position p, sample k of n is ``p * n + k``.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def optimizer_steps(samples: int, batch_size: int) -> int:
    """Optimizer steps of one pass over so many samples."""
    return -(-samples // batch_size)


def plan_minibatches(
    *, prompts: int, n_samples: int, batch_size: int, seed: int, step: int, epoch: int
) -> list[list[int]]:
    """Cut a step's samples into optimizer steps of ``batch_size``, shuffled. Where that does not divide them, all steps
    are a little smaller, so that none stands on a few samples.

    Ranks own prompts in turn (position p belongs to rank p mod world size). A free shuffle would give one rank many
    samples of an optimizer step and another few. So the samples are laid out with a step's size as columns and shuffled
    within each column: every optimizer step takes one sample a column, and the ranks' shares are equal wherever the
    world size divides ``prompts`` and ``batch_size``.

    :return: global sample indices for each optimizer step, each list sorted. Together they have every index once.
    """
    total = prompts * n_samples
    if not total:
        return []
    whole = math.gcd(prompts, batch_size)  # a size that all ranks can share out equally
    count = optimizer_steps(total, batch_size)
    columns = -(-total // (count * whole)) * whole
    generator = random.Random(_seed("minibatches", seed, step, epoch))
    steps: list[list[int]] = [[] for _ in range(count)]
    for column in range(columns):
        # Cells are numbered sample-major, so that a column's residue is its prompt's, and so its owner's.
        cells = list(range(column, total, columns))
        generator.shuffle(cells)
        for row, cell in enumerate(cells):
            steps[row].append(cell % prompts * n_samples + cell // prompts)
    return [sorted(indices) for indices in steps]


@dataclass(frozen=True)
class MicroBatch:
    """Global sample indices of one forward and backward pass on one rank; empty if a rank has fewer micro-batches than
    others."""

    indices: tuple[int, ...]


class SampleTooLongError(ValueError):
    """A sample has more tokens than ``--max_tokens_per_micro_batch`` allows."""


def balance(
    steps: Sequence[Sequence[int]], lengths: Mapping[int, int], *, ranks: int, equally_many: bool
) -> dict[int, int]:
    """Assign each sample to a data rank, so that in every optimizer step all have about the same number of tokens.

    Longest first, each to the rank with the fewest: at most a third above the optimum (Graham, 1969).

    :param steps: the samples of each optimizer step.
    :param equally_many: the ranks' numbers of samples also differ by at most one.
    """
    owners: dict[int, int] = {}
    for step in steps:
        tokens, counts = [0] * ranks, [0] * ranks
        most = -(-len(step) // ranks) if equally_many else len(step)
        for index in sorted(step, key=lambda index: (-lengths[index], index)):
            rank = min((r for r in range(ranks) if counts[r] < most), key=lambda r: (tokens[r], r))
            owners[index] = rank
            tokens[rank] += lengths[index]
            counts[rank] += 1
    return owners


def cut_microbatches(
    minibatch: Sequence[int],
    owners: Mapping[int, int],
    lengths: Mapping[int, int],
    *,
    world_size: int,
    size: int,
    max_tokens: int | None = None,
    packed: bool = False,
    n_samples: int = 1,
) -> list[list[MicroBatch]]:
    """Each rank's micro-batches of one optimizer step: the same number on every rank, with similar lengths in each.

    :param owners: data rank that holds each sample. :param lengths: tokens of each sample, to keep padding low.
    :param size: samples of a micro-batch. :param max_tokens: tokens of a micro-batch instead; padding counts, unless
        samples are ``packed``.
    :param n_samples: of a prompt, which stay together where ``size`` counts: for models that compute it once.
    :return: one list for each rank; shorter ones are filled up with empty micro-batches.
    :raises SampleTooLongError: a sample has more than ``max_tokens``; raised on every rank.
    """
    if max_tokens is not None and minibatch:
        longest = max(minibatch, key=lambda index: lengths[index])
        if lengths[longest] > max_tokens:
            raise SampleTooLongError(
                f"--max_tokens_per_micro_batch {max_tokens}: sample {longest} of this step has {lengths[longest]} "
                f"tokens; raise it to at least {lengths[longest]}, or lower --prompt_max_len or --generate_max_len"
            )
    n_samples = n_samples if max_tokens is None else 1
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in minibatch:
        shares[owners[index]].append(index)
    cut: list[list[MicroBatch]] = []
    for share in shares:
        longest_of: dict[int, int] = {}
        for index in share:
            prompt = index // n_samples
            longest_of[prompt] = max(lengths[index], longest_of.get(prompt, 0))
        share.sort(key=lambda index: (longest_of[index // n_samples], index // n_samples, lengths[index], index))
        if max_tokens is None:
            parts = [share[i : i + size] for i in range(0, len(share), size)]
        elif packed:
            parts = _first_fit(share[::-1], lengths, max_tokens)
        else:
            parts = _padded_fit(share, lengths, max_tokens)
        cut.append([MicroBatch(tuple(part)) for part in parts])
    most = max((len(batches) for batches in cut), default=0)
    for batches in cut:
        batches.extend([MicroBatch(())] * (most - len(batches)))
    return cut


def _first_fit(samples: Sequence[int], lengths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Rows of at most ``limit`` tokens; each sample, longest first, goes into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in samples:
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(limit)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _padded_fit(samples: Sequence[int], lengths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Batches of at most ``limit`` tokens when padded to their longest; samples come shortest first."""
    batches: list[list[int]] = []
    for index in samples:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _seed(*parts: object) -> int:
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
