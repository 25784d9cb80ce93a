from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.rewards import CheckedReward, RewardError, RewardOutput, RewardTimeoutError

PROMPTS = ["first prompt", "second prompt", "third prompt"]
RESPONSES = ["a", "b", "c"]
LABELS = ["a", "a", "c"]


def checked(function: Any, **options: Any) -> CheckedReward:
    return CheckedReward(function, name="mine", **options)


def returning(value: Any) -> CheckedReward:
    return checked(lambda prompts, responses, labels: value)


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.0, True],
        (1, 0, 1),
        numpy.array([1.0, 0.0, 1.0]),
        torch.tensor([1, 0, 1]),
        [torch.tensor(1.0), numpy.float32(0), 1],
    ],
)
def test_whatever_holds_one_number_a_sample_becomes_floats(value: Any):
    output = returning(value)(PROMPTS, RESPONSES, LABELS)
    assert output.rewards == [1.0, 0.0, 1.0]
    assert all(type(reward) is float for reward in output.rewards)


@pytest.mark.parametrize(
    ("value", "sample", "message"),
    [
        ([0.0, math.nan, 0.0], 1, r"returned nan for sample 1 \(prompt 'second prompt'\)"),
        ([0.0, 0.0, math.inf], 2, r"returned inf for sample 2 \(prompt 'third prompt'\)"),
        (torch.tensor([0.0, math.nan, 0.0]), 1, "sample 1"),
        ([0.0, "1", 0.0], 1, "'1', a str, for sample 1"),
        ([None, 0.0, 0.0], 0, "None, a NoneType, for sample 0"),
        ([[1.0], 0.0, 0.0], 0, "a list, for sample 0"),
        ([1.0, 0.0], None, "returned 2 numbers for 3 samples"),
        ([], None, "returned 0 numbers for 3 samples"),
        (1.0, None, "returned float '1.0' for 3 samples"),
        ("101", None, "returned str '101' for 3 samples"),
        (None, None, "returned NoneType"),
        ({"rewards": [1, 2, 3]}, None, "returned dict"),
        (
            RewardOutput([1.0, 0.0, 1.0], {"brevity": [1.0, math.nan, 0.0]}),
            1,
            "metric brevity, returned nan for sample 1",
        ),
    ],
)
def test_anything_else_is_an_error_that_names_the_sample(value: Any, sample: int | None, message: str):
    with pytest.raises(RewardError, match=message) as caught:
        returning(value)(PROMPTS, RESPONSES, LABELS)
    assert caught.value.sample == sample
    assert "one finite number" in str(caught.value)


@pytest.mark.parametrize(
    ("label", "advice"),
    [(None, "if it needs a label, name the label's key with --label_key; else correct"), ("x", "'x'); correct")],
)
def test_a_reward_that_stumbles_over_a_label_that_is_not_there_is_told_how_to_name_it(label: Any, advice: str):
    numeric = checked(lambda prompts, responses, labels: [float(label) for label in labels])
    with pytest.raises(RewardError, match=rf"raised \w+Error: .* for sample 0 of 1 .*{re.escape(advice)} the function"):
        numeric(PROMPTS[:1], RESPONSES[:1], [label])


@given(st.lists(st.one_of(st.floats(), st.integers(-5, 5), st.none(), st.text(max_size=2)), max_size=5))
def test_no_return_value_gets_past_the_check_unless_it_is_three_finite_numbers(value: list[Any]):
    good = len(value) == 3 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
    if good:
        assert returning(value)(PROMPTS, RESPONSES, LABELS).rewards == [float(v) for v in value]
    else:
        with pytest.raises(RewardError):
            returning(value)(PROMPTS, RESPONSES, LABELS)


def test_metrics_come_through():
    output = returning(RewardOutput([1.0, 0.0, 1.0], {"brevity": [3, 2, 1]}))(PROMPTS, RESPONSES, LABELS)
    assert output.metrics == {"brevity": [3.0, 2.0, 1.0]}


def test_a_reward_that_raises_names_the_sample_at_fault():
    def fails_on_b(prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any]) -> list[float]:
        return [1.0 / (response != "b") for response in responses]

    with pytest.raises(
        RewardError, match=r"ZeroDivisionError.*sample 1 of 3 \(prompt 'second prompt', response 'b'"
    ) as caught:
        checked(fails_on_b)(PROMPTS, RESPONSES, LABELS)
    assert caught.value.sample == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reward_that_raises_for_the_batch_alone_says_so():
    def fails_on_three(prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any]) -> list[float]:
        if len(prompts) == 3:
            raise KeyError("batch")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=r"KeyError.*batch of 3 samples, though for none of them alone"):
        checked(fails_on_three)(PROMPTS, RESPONSES, LABELS)


def test_the_sample_at_fault_is_found_with_its_own_extras():
    def reward(
        prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], *, lengths: list[int]
    ) -> list[float]:
        assert len(lengths) == len(prompts)
        return [1 / length for length in lengths]

    with pytest.raises(RewardError, match=r"ZeroDivisionError.*sample 2 of 3"):
        checked(reward)(PROMPTS, RESPONSES, LABELS, lengths=[1, 1, 0])


def test_a_late_reward_names_the_batch_the_limit_and_the_line():
    release = threading.Event()

    def waits(prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any]) -> list[float]:
        release.wait(60)
        return [0.0] * len(prompts)

    try:
        with pytest.raises(
            RewardTimeoutError,
            match=r"not return within 0\.2 s for 3 sample\(s\).*'first prompt'.*threading\.py:\d+.*--reward_timeout",
        ):
            checked(waits, timeout=0.2)(PROMPTS, RESPONSES, LABELS)
    finally:
        release.set()


def test_no_samples_do_not_call_the_function():
    assert checked(lambda prompts, responses, labels: 1 / 0)([], [], []).rewards == []


def test_a_function_is_given_only_the_extras_that_it_names():
    seen: dict[str, Any] = {}

    def named(prompts: Any, responses: Any, labels: Any, finish_reasons: Any = None) -> list[float]:
        seen["finish_reasons"] = finish_reasons
        return [0.0] * 3

    checked(named)(PROMPTS, RESPONSES, LABELS, finish_reasons=["stop"] * 3, images=[None] * 3)
    assert seen == {"finish_reasons": ["stop"] * 3}


def test_a_function_with_extras_is_given_all_of_them():
    seen: dict[str, Any] = {}

    def any_(prompts: Any, responses: Any, labels: Any, **extras: Any) -> list[float]:
        seen.update(extras)
        return [0.0] * 3

    checked(any_)(PROMPTS, RESPONSES, LABELS, finish_reasons=["stop"] * 3, images=[None] * 3)
    assert seen.keys() == {"finish_reasons", "images"}


def test_a_function_that_cannot_be_called_as_a_reward_is_refused_at_once():
    with pytest.raises(RewardError, match=r"def reward\(prompts, responses, labels, \*\*extras\)"):
        checked(lambda response: 1.0)
    with pytest.raises(RewardError, match=r"not a function"):
        checked(3)


def test_unequal_inputs_are_refused():
    with pytest.raises(RewardError, match=r"3 prompts, 2 responses and 3 labels"):
        returning([0.0])(PROMPTS, RESPONSES[:2], LABELS)


def test_a_timeout_must_be_positive():
    with pytest.raises(ValueError, match=r"timeout=0"):
        checked(lambda prompts, responses, labels: [], timeout=0)
