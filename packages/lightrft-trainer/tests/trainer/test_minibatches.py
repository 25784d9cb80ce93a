from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.trainer.minibatches import SampleTooLongError, balance, cut_microbatches, plan_minibatches


def plan(prompts: int, n: int, batch: int, epoch: int = 0, step: int = 3) -> list[list[int]]:
    return plan_minibatches(prompts=prompts, n_samples=n, batch_size=batch, seed=1, step=step, epoch=epoch)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_every_sample_is_trained_on_once_an_epoch(prompts: int, n: int, batch: int) -> None:
    steps = plan(prompts, n, batch)
    assert sorted(index for step in steps for index in step) == list(range(prompts * n))
    assert all(len(step) <= batch for step in steps)
    assert len(steps) == -(-prompts * n // min(batch, prompts * n))


def test_no_optimizer_step_stands_on_the_few_samples_that_are_left() -> None:
    """With --dynamic_sampling a step may have any number of prompts."""
    assert [len(step) for step in plan(33, 4, 128)] == [66, 66]
    assert [len(step) for step in plan(20, 8, 128)] == [80, 80]
    assert [len(step) for step in plan(32, 8, 128)] == [128, 128]


def test_epochs_and_steps_are_shuffled_differently_and_repeatably() -> None:
    assert plan(8, 4, 8) == plan(8, 4, 8)
    assert plan(8, 4, 8) != plan(8, 4, 8, epoch=1)
    assert plan(8, 4, 8) != plan(8, 4, 8, step=4)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 16, 24]), st.integers(1, 4), st.sampled_from([8, 16, 32]))
@settings(max_examples=60, deadline=None)
def test_ranks_have_equal_shares_of_every_optimizer_step(ranks: int, prompts: int, n: int, batch: int) -> None:
    owners = {index: index // n % ranks for index in range(prompts * n)}
    for step in plan(prompts, n, batch):
        shares = [sum(owners[index] == rank for index in step) for rank in range(ranks)]
        assert max(shares) - min(shares) <= (0 if len(step) % ranks == 0 else 1)


def test_ranks_with_less_fill_up_with_empty_micro_batches() -> None:
    owners = {0: 0, 1: 0, 2: 0, 3: 1}
    cut = cut_microbatches([0, 1, 2, 3], owners, dict.fromkeys(range(4), 5), world_size=3, size=2)
    assert [len(batches) for batches in cut] == [2, 2, 2]
    assert [b.indices for b in cut[0]] == [(0, 1), (2,)]
    assert [b.indices for b in cut[1]] == [(3,), ()]
    assert [b.indices for b in cut[2]] == [(), ()]


def test_micro_batches_hold_similar_lengths() -> None:
    lengths = {0: 9, 1: 1, 2: 8, 3: 2}
    (cut,) = cut_microbatches([0, 1, 2, 3], dict.fromkeys(range(4), 0), lengths, world_size=1, size=2)
    assert [b.indices for b in cut] == [(1, 3), (2, 0)]


def test_samples_of_one_prompt_stay_together_where_asked() -> None:
    lengths = {0: 9, 1: 3, 2: 4, 3: 8}  # two prompts of two samples
    (cut,) = cut_microbatches([0, 1, 2, 3], dict.fromkeys(range(4), 0), lengths, world_size=1, size=2, n_samples=2)
    assert [batch.indices for batch in cut] == [(2, 3), (1, 0)]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    ranks=st.integers(1, 3),
    limit=st.integers(30, 90),
    packed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_micro_batches_by_tokens_stay_within_the_limit_and_lose_nothing(
    lengths: list[int], ranks: int, limit: int, packed: bool
) -> None:
    by_index = dict(enumerate(lengths))
    owners = {index: index % ranks for index in by_index}
    options = {"world_size": ranks, "size": 1, "max_tokens": limit, "packed": packed}
    cut = cut_microbatches(list(by_index), owners, by_index, **options)  # type: ignore[arg-type]
    assert len({len(batches) for batches in cut}) == 1
    for rank, batches in enumerate(cut):
        assert sorted(i for b in batches for i in b.indices) == [i for i in by_index if owners[i] == rank]
        for batch in batches:
            sizes = [lengths[index] for index in batch.indices]
            assert (sum(sizes) if packed else len(sizes) * max(sizes, default=0)) <= limit


def test_packed_rows_are_nearly_full() -> None:
    lengths = dict(enumerate([70, 30, 60, 40, 55, 45, 20, 20, 20, 20, 20]))
    (cut,) = cut_microbatches(
        list(lengths), dict.fromkeys(lengths, 0), lengths, world_size=1, size=1, max_tokens=100, packed=True
    )
    assert [sum(lengths[index] for index in batch.indices) for batch in cut] == [100] * 4


def test_padded_micro_batches_are_filled_up_to_the_limit() -> None:
    lengths = dict.fromkeys(range(4), 5)
    (cut,) = cut_microbatches(list(lengths), dict.fromkeys(lengths, 0), lengths, world_size=1, size=1, max_tokens=10)
    assert [batch.indices for batch in cut] == [(0, 1), (2, 3)]


def test_a_sample_above_the_limit_is_named_with_its_length() -> None:
    with pytest.raises(SampleTooLongError, match=r"max_tokens_per_micro_batch 10: sample 1 of this step has 12 tokens"):
        cut_microbatches([0, 1], {0: 0, 1: 1}, {0: 3, 1: 12}, world_size=2, size=1, max_tokens=10)


@given(st.lists(st.integers(1, 100), min_size=8, max_size=32), st.sampled_from([2, 4]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ranks_get_about_as_many_tokens_as_each_other(lengths: list[int], ranks: int, equally_many: bool) -> None:
    by_index = dict(enumerate(lengths))
    steps = [list(by_index)[0::2], list(by_index)[1::2]]
    owners = balance(steps, by_index, ranks=ranks, equally_many=equally_many)
    for step in steps:
        tokens = [sum(by_index[i] for i in step if owners[i] == rank) for rank in range(ranks)]
        counts = [sum(owners[i] == rank for i in step) for rank in range(ranks)]
        if equally_many:
            assert max(counts) <= -(-len(step) // ranks)
        else:
            assert max(tokens) - min(tokens) <= max(by_index[i] for i in step)
