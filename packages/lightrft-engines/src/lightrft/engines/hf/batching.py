"""Which prompts share a prefill, and which share a forward: pure decisions over lengths."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

PREFILL_TOKENS = 16_384  # padded tokens in one prefill
FREE_PADDING = 256  # padding below this costs less than another call
PADDING_SHARE = 0.25
DISTINCT_ENDS = 8  # logits are computed at every distinct last position, for all prompts of the batch


def group_equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys together, in the order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def prefill_buckets(lengths: Sequence[int], *, tokens: int = PREFILL_TOKENS, ragged: bool = True) -> list[list[int]]:
    """Split prompts into right-padded prefill batches, by ascending length.

    :param lengths: tokens of each prompt. :param tokens: most padded tokens in a batch (a longer prompt is alone).
    :param ragged: False if padding is not allowed, so that each batch has one length.
    :return: indices into ``lengths``; each index once.
    """
    buckets: list[list[int]] = []
    padding = real = ends = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        length = lengths[index]
        if buckets:
            bucket = buckets[-1]
            previous = lengths[bucket[-1]]
            wider = padding + len(bucket) * (length - previous)
            fits = (
                length * (len(bucket) + 1) <= tokens
                and (length == previous or (ragged and ends < DISTINCT_ENDS))
                and wider <= max(FREE_PADDING, PADDING_SHARE * (real + length))
            )
            if fits:
                bucket.append(index)
                padding, real, ends = wider, real + length, ends + (length != previous)
                continue
        buckets.append([index])
        padding, real, ends = 0, length, 1
    return buckets


def worth_compacting(finished: int, rows: int, waiting: int) -> bool:
    """Whether to remove finished rows now: moving rows costs about as much as one step of a few of them."""
    return finished == rows or finished * 8 >= rows or (waiting > 0 and finished * 16 >= rows)


def swap_remove(done: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Fill the places of finished rows with the last unfinished ones.

    :return: (holes, movers): row ``movers[i]`` goes to ``holes[i]``; afterwards the unfinished rows come first.
    """
    living = sum(not flag for flag in done)
    holes = [row for row in range(living) if done[row]]
    movers = [row for row in range(living, len(done)) if not done[row]]
    return holes, movers
