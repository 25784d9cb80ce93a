from __future__ import annotations

import math

import pytest

from lightrft.cli.doctor.judge import drift_problem, growth_problem, repeated


def test_rounding_is_no_drift_and_a_stale_matrix_is() -> None:
    assert drift_problem(2e-7, 1e-6, "float32") is None
    assert drift_problem(0.01, 0.2, "bfloat16") is None
    assert "0.2 is above 0.05, the limit in bfloat16" in str(drift_problem(0.2, 1.0, "bfloat16"))
    assert "0.01 is above 0.001, the limit in float32" in str(drift_problem(0.01, 0.02, "float32"))


@pytest.mark.parametrize("figures", [(math.nan, 0.0), (0.0, math.nan)])
def test_what_is_no_number_is_a_problem(figures: tuple[float, float]) -> None:
    assert drift_problem(*figures, "float32") == "a logprob is NaN"


def test_drift_may_vary_within_rounding_but_not_grow() -> None:
    assert growth_problem(1e-7, 9e-7, "float32") is None
    assert growth_problem(0.01, 0.019, "bfloat16") is None
    assert "grew from 0.01 to 0.04" in str(growth_problem(0.01, 0.04, "bfloat16"))


def test_answers_that_differ_after_waking() -> None:
    same = [[1, 2], [3], [4], [5]]
    assert repeated(same, same, "float32") == ("ok", 4)
    assert repeated(same, [*same[:3], [6]], "float32") == ("failed", 3)
    assert repeated(same, [*same[:3], [6]], "bfloat16") == ("warning", 3)
    assert repeated(same, [[0], [0], [0], [5]], "bfloat16") == ("failed", 1)
