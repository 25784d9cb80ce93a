from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.rewards import soft_overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**6, -1.0)]
)
def test_the_paper_s_own_limits(length: int, penalty: float):
    # DAPO's run: 20,480 tokens at most, of which the last 4,096 are the buffer.
    assert soft_overlong_penalty(length, max_length=20480, buffer_length=4096) == pytest.approx(penalty)


@given(st.integers(1, 5000), st.data())
def test_the_penalty_falls_steadily_from_0_to_minus_1(max_length: int, data: st.DataObject):
    buffer_length = data.draw(st.integers(0, max_length))
    lengths = sorted(data.draw(st.lists(st.integers(0, 2 * max_length), min_size=1, max_size=10)))
    penalties = [soft_overlong_penalty(n, max_length=max_length, buffer_length=buffer_length) for n in lengths]
    assert penalties == sorted(penalties, reverse=True)
    assert all(-1.0 <= penalty <= 0.0 for penalty in penalties)


@pytest.mark.parametrize(("length", "max_length", "buffer_length"), [(-1, 10, 2), (1, 0, 0), (1, 10, 11), (1, 10, -1)])
def test_limits_that_make_no_sense_are_refused(length: int, max_length: int, buffer_length: int):
    with pytest.raises(ValueError, match=r"buffer_length <= max_length"):
        soft_overlong_penalty(length, max_length=max_length, buffer_length=buffer_length)
