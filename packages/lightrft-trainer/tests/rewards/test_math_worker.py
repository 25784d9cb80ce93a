from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from lightrft.rewards.math_worker import MathWorker


@pytest.fixture(scope="module")
def worker() -> Iterator[MathWorker]:
    worker = MathWorker(compare_seconds=60.0)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("x^2 + 1", "1 + x^2", True),
        ("50\\%", "0.5", True),
        ("(1, 2)", "(1,2)", True),
        ("\\frac{1}{3}", "0.5", False),
        ("apple", "3", False),
        ("\\frac{1", "3", False),
    ],
)
def test_expressions_are_compared_by_meaning(worker: MathWorker, answer: str, reference: str, equal: bool):
    assert worker.equal(answer, reference) is equal


def test_an_endless_comparison_is_ended_and_the_next_one_works(worker: MathWorker, caplog: pytest.LogCaptureFixture):
    worker.compare_seconds, usual = 0.5, worker.compare_seconds
    with caplog.at_level(logging.WARNING):
        assert worker.equal("9^{9^{9^9}}", "3") is False
    assert "took longer than 0.5 s" in caplog.text
    worker.compare_seconds = usual
    assert worker.equal("\\frac{1}{2}", "0.5") is True


def test_a_helper_that_was_killed_is_started_again(worker: MathWorker):
    assert worker.equal("\\frac{1}{2}", "0.5") is True
    process = worker._process
    assert process is not None
    process.kill()
    process.wait()
    assert worker.equal("\\frac{1}{2}", "0.5") is True


def test_a_helper_that_does_not_start_says_what_to_try():
    with pytest.raises(RuntimeError, match=r"python -c 'import math_verify'"):
        MathWorker(start_seconds=0.0).equal("\\frac{1}{2}", "0.5")
