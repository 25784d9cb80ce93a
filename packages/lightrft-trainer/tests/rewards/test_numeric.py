from __future__ import annotations

import json
import logging
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.rewards import math_worker, numeric, numeric_answer
from lightrft.rewards.math_worker import MathWorker
from lightrft.rewards.numeric import answers_equal, extract_answer, plain_number, reference_answer

GSM8K_LABEL = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


class NoWorker(MathWorker):
    """Fails a test that asks for more than plain numbers."""

    def equal(self, answer: str, reference: str) -> bool:
        raise AssertionError(f"asked the helper about {answer!r} and {reference!r}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("5 apples, 7 pears, so 12", "12"),
        ("#### 1,234", "1,234"),
        ("so \\boxed{\\frac{1}{2}} indeed, by 3", "\\frac{1}{2}"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{1} but finally #### 3", "3"),
        ("<answer> 5 </answer> as 6 was wrong", "5"),
        ("3-4", "4"),
        ("it was -3 degrees", "-3"),
        ("$18.50 each", "$18.50"),
        ("1/2", "1/2"),
        ("x2 and y3", None),
        ("\\boxed{never closed", None),
        ("<answer></answer>", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_marked_answer_counts_or_else_the_last_number(text: str, answer: str | None):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{" * 20_000, None),
        ("\\boxed{" * 20_000 + "7" + "}" * 20_000, "7"),
        ("<answer>" * 20_000, None),
        ("<answer>5</answer>" + "<answer>" * 20_000, "5"),
        ("1}} } \\boxed{2} { {", "2"),
        ("{ \\boxed{2} \\boxed{ {3}", "2"),
    ],
)
def test_a_mark_repeated_without_end_takes_one_pass(text: str, answer: str | None):
    begun = time.process_time()
    assert extract_answer(text) == answer
    assert time.process_time() - begun < 5.0


def test_a_gsm8k_label_is_read_after_its_mark():
    assert reference_answer(GSM8K_LABEL) == "72"
    assert reference_answer("\\boxed{7}") == "7"
    assert reference_answer(" 42 ") == "42"


@given(st.integers(-(10**12), 10**12))
def test_an_integer_reads_back_with_and_without_thousands_commas(number: int):
    assert plain_number(str(number)) == plain_number(f"{number:,}") == plain_number(f"${number}") == number


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_a_fraction_reads_back_exactly(numerator: int, denominator: int):
    assert plain_number(f"{numerator}/{denominator}") == Fraction(numerator, denominator)


@given(st.text(max_size=40))
def test_no_response_breaks_extraction(text: str):
    answer = extract_answer(text)
    assert answer is None or answer
    plain_number(text)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("72", "72", True),
        ("72.0", "72", True),
        ("72.", "72", True),
        ("1,234", "1234", True),
        ("0.5", "1/2", True),
        ("0.3333", "1/3", False),
        ("1/0", "1/0 ", True),  # the same text, whatever it means
        ("18 dollars", "18", True),
        ("18 clips in all.", "18", True),
        ("2", "3", False),
        ("7" * 2000, "7", False),
    ],
)
def test_plain_numbers_are_compared_without_the_helper(answer: str, reference: str, equal: bool):
    assert answers_equal(answer, reference, worker=NoWorker()) is equal


class NeverEqual(MathWorker):
    def equal(self, answer: str, reference: str) -> bool:
        return False


@pytest.mark.parametrize("answer", ["18 thousand", "18 million dollars", "18 percent", "18 dozen eggs."])
def test_a_word_that_changes_the_number_is_no_unit(answer: str):
    assert not answers_equal(answer, "18", worker=NeverEqual())


def test_a_gsm8k_response_is_graded_by_its_number(caplog: pytest.LogCaptureFixture):
    responses = ["48 / 2 = 24, and 48 + 24 = 72\n#### 72", "The answer is \\boxed{72}", "It is 71", "I do not know"]
    assert numeric_answer(["q"] * 4, responses, [GSM8K_LABEL] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert not caplog.records


class SlowHelper:
    """A helper whose every comparison takes as long as it may, by a clock of its own."""

    def __init__(self, worker: MathWorker, seconds: float) -> None:
        self.worker, self.left, self.stdin = worker, seconds, self

    def seconds_left(self, share: float) -> float:
        return share * self.left

    def poll(self) -> None: ...
    def flush(self) -> None: ...

    def write(self, question: str) -> None:
        self.left -= json.loads(question)[2]
        self.worker._answers.put("late")


def test_slow_comparisons_end_before_the_batch_s_time_and_count_as_unequal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    worker = MathWorker()
    helper: Any = SlowHelper(worker, 60.0)
    monkeypatch.setattr(numeric, "_shared_worker", worker)
    monkeypatch.setattr(worker, "_process", helper)
    monkeypatch.setattr(math_worker, "seconds_left", helper.seconds_left)
    responses = ["#### \\sqrt{2}"] * 100 + ["#### 3"]
    with caplog.at_level(logging.WARNING):
        assert numeric_answer(["q"] * 101, responses, ["3"] * 101) == [0.0] * 100 + [1.0]
    assert helper.left > 0
    assert caplog.text.count("skipped for lack of time") == 1
    assert f"{worker.left_out} comparisons" in caplog.text and 0 < worker.left_out < 95
