"""An engine's capabilities against a run's settings, before anything loads."""

from __future__ import annotations

import logging
from importlib.metadata import version

import pytest

from lightrft.strategy import StrategyConfig
from lightrft.strategy.engine import EngineCapabilities
from lightrft.strategy.engine_checks import check_engine, engine_faults, untested_version
from lightrft.strategy.errors import ConfigError


def test_everything_that_the_engine_cannot_do_is_told_at_once() -> None:
    capabilities = EngineCapabilities(devices=("cuda",), sleep_levels=(1,))
    config = StrategyConfig(engine_tp_size=2, engine_sleep_level=2)
    with pytest.raises(ConfigError) as error:
        check_engine("mine", capabilities, config, "cpu")
    found = "\n".join(error.value.problems)
    assert len(error.value.problems) == 3
    for words in (
        "--engine_tp_size 2",
        "--engine_type vllm or sglang",
        "does not run on cpu; it runs on cuda",
        "--engine_sleep_level 2",
    ):
        assert words in found


def test_a_sleep_level_matters_only_where_the_engine_may_sleep() -> None:
    capabilities = EngineCapabilities(sleep_levels=())
    assert engine_faults("mine", capabilities, StrategyConfig(enable_engine_sleep=False), "cpu") == []
    assert "--disable_engine_sleep" in engine_faults("mine", capabilities, StrategyConfig(), "cpu")[0]


def test_an_untested_version_is_warned_of_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    capabilities = EngineCapabilities(requires="torch>=99,<100")
    with caplog.at_level(logging.WARNING):
        check_engine("mine", capabilities, StrategyConfig(), "cpu")
    assert "torch<100,>=99" in caplog.text
    assert version("torch") in caplog.text


@pytest.mark.parametrize("requires", [None, "torch>=1", "no-such-thing>=1 or torch>=1", "no-such-thing>=1"])
def test_a_tested_version_is_not_worth_a_word(requires: str | None) -> None:
    assert untested_version("mine", requires) is None
