"""Which samples an optimizer step takes, and how each rank cuts its share into micro-batches.

Pure functions of (seed, step, epoch) and of the samples' global indices, so that the same samples meet in the same
optimizer step on any number of ranks, and a resumed run finds its place again.

Global sample indices count within a rollout step: prompt at position p, sample k of n is ``p * n + k``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def plan_minibatches(
    *, prompts: int, n_samples: int, batch_size: int, seed: int, step: int, epoch: int
) -> list[list[int]]:
    """Cut a step's samples into optimizer steps of ``batch_size``, shuffled.

    Ranks own prompts in turn (position p belongs to rank p mod world size). A free shuffle would give one rank many
    samples of an optimizer step and another few. So the samples are laid out with ``batch_size`` columns and shuffled
    within each column: every optimizer step takes one sample a column, and the ranks' shares are equal wherever the
    world size divides ``prompts`` and ``batch_size``.

    :return: global sample indices for each optimizer step, each list sorted. Together they are every index once.
    """
    total = prompts * n_samples
    columns = min(batch_size, total)
    if columns == 0:
        return []
    generator = random.Random(_seed("minibatches", seed, step, epoch))
    steps: list[list[int]] = [[] for _ in range(-(-total // columns))]
    for column in range(columns):
        # Cells are numbered sample-major, so that a column's residue is its prompt's, and so its owner's.
        cells = list(range(column, total, columns))
        generator.shuffle(cells)
        for row, cell in enumerate(cells):
            steps[row].append(cell % prompts * n_samples + cell // prompts)
    return [sorted(indices) for indices in steps]


@dataclass(frozen=True)
class MicroBatch:
    """Global sample indices of one forward and backward pass on one rank; empty on a rank that fills up."""

    indices: tuple[int, ...]


def cut_microbatches(
    minibatch: Sequence[int], owners: Mapping[int, int], lengths: Mapping[int, int], *, world_size: int, size: int
) -> list[list[MicroBatch]]:
    """Each rank's micro-batches of one optimizer step: equally many on every rank, of similar lengths within each.

    :param owners: data rank that holds each sample. :param lengths: tokens of each sample, to keep padding low.
    :return: one list for each rank; short ones are filled up with empty micro-batches.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in minibatch:
        shares[owners[index]].append(index)
    cut: list[list[MicroBatch]] = []
    for share in shares:
        share.sort(key=lambda index: (lengths[index], index))
        cut.append([MicroBatch(tuple(share[i : i + size])) for i in range(0, len(share), size)])
    most = max((len(batches) for batches in cut), default=0)
    for batches in cut:
        batches.extend([MicroBatch(())] * (most - len(batches)))
    return cut


def _seed(*parts: object) -> int:
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
