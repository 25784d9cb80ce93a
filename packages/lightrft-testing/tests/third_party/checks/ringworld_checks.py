"""What ringworld's author runs: LightRFT's suites, against the installed plug-ins."""

from __future__ import annotations

from typing import Any

import pytest

from lightrft.strategy import get_strategy
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.registry import load_plugin
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.testing.engine_suite import EngineContractSuite
from lightrft.testing.strategy_suite import StrategySuite, on_ranks


class TestRing(StrategySuite):
    world_size = 2

    @classmethod
    def make_strategy(cls, args: Any = None, **settings: Any) -> StrategyBase:
        if args is not None:
            return load_plugin("strategies", "ring")(args=args, **settings)
        strategy = get_strategy({"strategy": "ring"})
        return type(strategy)(**settings)

    @pytest.mark.xfail(reason="ring cannot fill models that were built without memory", strict=True)
    @on_ranks
    def test_a_model_may_be_built_without_memory_and_filled_later(self) -> None:
        StrategySuite.test_a_model_may_be_built_without_memory_and_filled_later.claim(self)  # type: ignore[attr-defined]


class TestParrot(EngineContractSuite):
    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = load_plugin("engines", "parrot")()
            engine.start(spec)
            return engine

        return make
