from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightrft.engines.hf.batching import (
    DISTINCT_ENDS,
    FREE_PADDING,
    PADDING_SHARE,
    group_equal,
    prefill_buckets,
    swap_remove,
    worth_compacting,
)
from lightrft.engines.hf.decoding import Sample, quiet_tokens
from lightrft.engines.processed_prompts import Prompt
from lightrft.strategy.sampling import SamplingParams


def test_equal_prompts_are_grouped_in_order_of_appearance() -> None:
    assert group_equal(["b", "a", "b", "c", "a"]) == [[0, 2], [1, 4], [3]]


@given(lengths=st.lists(st.integers(1, 3000), max_size=60), tokens=st.sampled_from([1, 500, 16_384]))
def test_buckets_hold_each_prompt_once_within_the_bounds(lengths: list[int], tokens: int) -> None:
    buckets = prefill_buckets(lengths, tokens=tokens)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        inside = [lengths[i] for i in bucket]
        padded = max(inside) * len(inside)
        assert len(bucket) == 1 or padded <= tokens
        assert padded - sum(inside) <= max(FREE_PADDING, PADDING_SHARE * sum(inside))
        assert len(set(inside)) <= DISTINCT_ENDS


def test_short_prompts_of_mixed_lengths_are_one_prefill() -> None:
    assert len(prefill_buckets([5, 17, 30, 40, 12])) == 1


@given(lengths=st.lists(st.integers(1, 20), max_size=30))
def test_without_padding_a_bucket_has_one_length(lengths: list[int]) -> None:
    for bucket in prefill_buckets(lengths, ragged=False):
        assert len({lengths[i] for i in bucket}) == 1


@given(done=st.lists(st.booleans(), max_size=40))
def test_moving_rows_leaves_the_living_in_front(done: list[bool]) -> None:
    holes, movers = swap_remove(done)
    table = list(range(len(done)))
    for hole, mover in zip(holes, movers, strict=True):
        table[hole] = mover
    living = done.count(False)
    assert sorted(table[:living]) == [i for i, flag in enumerate(done) if not flag]
    assert len(movers) <= done.count(True)


def test_compaction_waits_until_it_pays() -> None:
    assert not worth_compacting(1, 64, waiting=0)
    assert worth_compacting(8, 64, waiting=0)
    assert worth_compacting(4, 64, waiting=10)
    assert worth_compacting(1, 1, waiting=0)


def test_no_step_asks_who_is_finished_before_anyone_can_be() -> None:
    def sample(limit: int, *, minimum: int = 0, stops: tuple[int, ...] = ()) -> Sample:
        sampling = SamplingParams(max_tokens=limit, min_tokens=minimum)
        return Sample(prompt=Prompt(ids=(1,)), sampling=sampling, seed=0, limit=limit, stops=stops)

    assert quiet_tokens([sample(8), sample(5)], [0, 0]) == 4  # the fifth token is somebody's last
    assert quiet_tokens([sample(8), sample(5)], [0, 4]) == 0
    assert quiet_tokens([sample(8, stops=(2,))], [0]) == 0
    assert quiet_tokens([sample(8, minimum=3, stops=(2,)), sample(9)], [1, 0]) == 2
    assert quiet_tokens([sample(8, minimum=8, stops=(2,))], [0]) == 7
    assert quiet_tokens([], []) == 0
