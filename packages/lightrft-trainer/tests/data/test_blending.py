from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.data.blending import blend_counts, choose, parse_shares
from lightrft.data.records import DataError

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("sizes", "shares", "limit", "counts"),
    [
        ([100, 50], None, 1000, [100, 50]),
        ([100, 50], None, 30, [20, 10]),
        ([100, 100], [0.7, 0.3], 1000, [100, 42]),
        ([10, 1000], [0.5, 0.5], 1000, [10, 10]),
        ([1000, 1000], [0.3, 0.7], 10, [3, 7]),
        ([1000, 1], [0.999, 0.001], 5, [4, 1]),
    ],
)
def test_counts(sizes: list[int], shares: list[float] | None, limit: int, counts: list[int]):
    assert blend_counts(sizes, shares, limit) == counts


@given(SIZES, st.data())
def test_a_blend_repeats_nothing_respects_the_limit_and_keeps_shares_to_one_prompt(
    sizes: list[int], data: st.DataObject
):
    weights = data.draw(st.lists(st.floats(0.05, 1.0), min_size=len(sizes), max_size=len(sizes)))
    shares = [weight / sum(weights) for weight in weights]
    limit = data.draw(st.integers(len(sizes), 20_000))
    counts = blend_counts(sizes, shares, limit)
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert sum(counts) <= limit
    whole = min(limit, *(size / share for size, share in zip(sizes, shares, strict=True)))
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - whole * share) <= 1.0 + len(sizes)


@given(SIZES)
def test_without_shares_everything_is_taken(sizes: list[int]):
    assert blend_counts(sizes, None, sum(sizes)) == sizes


@given(st.integers(1, 200), st.integers(0, 5), st.data())
def test_a_draw_is_ordered_distinct_and_seeded(size: int, seed: int, data: st.DataObject):
    count = data.draw(st.integers(1, size))
    drawn = choose(size, count, seed)
    assert drawn == sorted(set(drawn)) and len(drawn) == count and set(drawn) <= set(range(size))
    assert drawn == choose(size, count, seed)


@pytest.mark.parametrize("text", ["0.5", "0.5,x", "0.5,0", "0.5,-1", "0.5,nan", "0.2,0.3,0.5"])
def test_broken_shares_are_refused(text: str):
    with pytest.raises(DataError, match=r"--prompt_data_probs"):
        parse_shares(text, 2)


def test_shares_need_not_add_up_to_one():
    assert parse_shares("7,3", 2) == [0.7, 0.3]
    assert parse_shares(None, 2) is None


def test_a_limit_below_the_number_of_datasets_is_refused():
    with pytest.raises(DataError, match=r"--max_samples 1"):
        blend_counts([5, 5], None, 1)
