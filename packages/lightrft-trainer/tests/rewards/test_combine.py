from __future__ import annotations

from typing import Any

import pytest

from lightrft.rewards import CheckedReward, CombinedReward, RewardError, RewardOutput


def part(name: str, values: Any) -> CheckedReward:
    return CheckedReward(lambda prompts, responses, labels: values, name=name)


def test_the_weighted_sum_and_each_part_are_there():
    combined = CombinedReward(
        [(part("right", [1, 0]), 1.0), (part("short", RewardOutput([0.5, 1.0], {"words": [3, 1]})), -0.5)]
    )
    output = combined(["p", "q"], ["a", "b"], [None, None])
    assert output.rewards == [0.75, -0.5]
    assert output.metrics == {"right": [1.0, 0.0], "short": [0.5, 1.0], "short/words": [3.0, 1.0]}
    assert combined.name == "right+short"


def test_a_single_part_is_not_listed_twice():
    output = CombinedReward([(part("right", RewardOutput([1.0], {"steps": [2]})), 2.0)])(["p"], ["a"], [None])
    assert output.rewards == [2.0]
    assert output.metrics == {"steps": [2.0]}


def test_a_fault_names_its_part():
    with pytest.raises(RewardError, match=r"reward short returned nan"):
        CombinedReward([(part("right", [1.0]), 1.0), (part("short", [float("nan")]), 0.1)])(["p"], ["a"], [None])


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_is_a_finite_number_other_than_0(weight: float):
    with pytest.raises(ValueError, match=f"right={weight}"):
        CombinedReward([(part("right", [1.0]), weight)])


def test_a_name_twice_or_no_part_is_refused():
    with pytest.raises(ValueError, match=r"right appears more than once"):
        CombinedReward([(part("right", [1.0]), 1.0), (part("right", [1.0]), 1.0)])
    with pytest.raises(ValueError, match=r"at least one"):
        CombinedReward([])


def test_a_sum_that_overflows_is_an_error():
    with pytest.raises(RewardError, match=r"weighted sum for sample 0 is inf"):
        CombinedReward([(part("a", [1e308]), 1.0), (part("b", [1e308]), 1.0)])(["p"], ["a"], [None])
