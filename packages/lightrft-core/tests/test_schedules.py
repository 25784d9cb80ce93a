from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SchedulerType

from lightrft.strategy import StrategyConfig
from lightrft.strategy.errors import ConfigError
from lightrft.strategy.schedules import KNOWN, make_scheduler


def rates(name: str, steps: int, warmup: float) -> list[float]:
    """Learning rate of each step, as a share of the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: Any = make_scheduler(name, optimizer, steps, warmup)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


OURS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]


@pytest.mark.parametrize("name", OURS)
@given(steps=st.integers(1, 60), warmup=st.floats(0, 1))
def test_rates_rise_to_the_peak_and_never_pass_it(name: str, steps: int, warmup: float) -> None:
    values = rates(name, steps, warmup)
    assert all(0 <= value <= 1 for value in values)
    assert values[0] > 0, "no step is wasted"
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_known_shapes() -> None:
    assert rates("constant", 4, 0.5) == [1.0] * 4
    assert rates("constant_with_warmup", 4, 0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates("linear", 4, 0.0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates("cosine", 4, 0.0) == pytest.approx([1, 0.853553, 0.5, 0.146447], rel=1e-5)
    tenth_and_up = [0.1 + 0.9 * rate for rate in (1, 0.853553, 0.5, 0.146447)]
    assert rates("cosine_with_min_lr", 4, 0.0) == pytest.approx(tenth_and_up, rel=1e-5), "down to a tenth of the peak"


def test_the_way_down_begins_where_warming_up_ends() -> None:
    falls = {"linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.853553, 0.5, 0.146447]}
    falls["cosine_with_min_lr"] = [0.1 + 0.9 * rate for rate in falls["cosine"]]
    for name, fall in falls.items():
        assert rates(name, 6, 1 / 3) == pytest.approx([1 / 3, 2 / 3, *fall], rel=1e-5)


def test_a_schedule_of_transformers_works_by_its_name() -> None:
    values = rates("polynomial", 10, 0.2)
    assert values[0] == 0.0
    assert max(values) == 1.0


@pytest.mark.parametrize("name", KNOWN)
def test_every_schedule_that_a_run_may_name_can_be_made(name: str) -> None:
    assert all(0 <= rate <= 1 for rate in rates(name, 10, 0.2))


@pytest.mark.parametrize("name", sorted({kind.value for kind in SchedulerType} - set(KNOWN)))
def test_a_schedule_of_transformers_that_needs_more_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--lr_scheduler {name}: must be one of constant, .*polynomial"):
        rates(name, 3, 0.0)
    with pytest.raises(ConfigError, match=rf"--lr_scheduler '{name}': .*'constant', .*'polynomial'"):
        StrategyConfig.from_args({"lr_scheduler": name})


def test_an_unknown_schedule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--lr_scheduler cosin: must be one of .*cosine"):
        rates("cosin", 3, 0.0)
