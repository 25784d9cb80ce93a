"""What ringworld's author runs: LightRFT's suites, against the installed plug-ins."""

from __future__ import annotations

from typing import Any

import pytest

from lightrft.strategy import get_strategy
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.registry import load_plugin
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.testing.engine_suite import EngineContractSuite
from lightrft.testing.strategy_claims.meta_models import KINDS
from lightrft.testing.strategy_suite import StrategySuite, on_ranks

without_memory = pytest.mark.xfail(reason="ring cannot fill models that were built without memory", strict=True)


class TestRing(StrategySuite):
    world_size = 2

    @classmethod
    def make_strategy(cls, args: Any = None, **settings: Any) -> StrategyBase:
        if args is not None:
            return load_plugin("strategies", "ring")(args=args, **settings)
        strategy = get_strategy({"strategy": "ring"})
        return type(strategy)(**settings)

    @without_memory
    @on_ranks
    def test_a_model_may_be_built_without_memory_and_filled_later(self) -> None:
        StrategySuite.test_a_model_may_be_built_without_memory_and_filled_later.claim(self)  # type: ignore[attr-defined]

    @without_memory
    @pytest.mark.parametrize("kind", KINDS)
    @on_ranks
    def test_a_meta_model_is_read_from_the_folder_that_its_configuration_names(self, kind: str) -> None:
        StrategySuite.test_a_meta_model_is_read_from_the_folder_that_its_configuration_names.claim(self, kind)  # type: ignore[attr-defined]

    @without_memory
    @pytest.mark.parametrize("kind", KINDS)
    @on_ranks
    def test_a_meta_model_from_scratch_is_the_one_that_fake_makes(self, kind: str) -> None:
        StrategySuite.test_a_meta_model_from_scratch_is_the_one_that_fake_makes.claim(self, kind)  # type: ignore[attr-defined]

    @without_memory
    @on_ranks
    def test_a_meta_model_that_nothing_fills_refuses_to_run(self) -> None:
        StrategySuite.test_a_meta_model_that_nothing_fills_refuses_to_run.claim(self)  # type: ignore[attr-defined]

    @without_memory
    @on_ranks
    def test_a_meta_model_that_a_checkpoint_fills_runs(self) -> None:
        StrategySuite.test_a_meta_model_that_a_checkpoint_fills_runs.claim(self)  # type: ignore[attr-defined]

    @without_memory
    @on_ranks
    def test_an_optimizer_made_on_a_meta_model_trains_the_filled_one(self) -> None:
        StrategySuite.test_an_optimizer_made_on_a_meta_model_trains_the_filled_one.claim(self)  # type: ignore[attr-defined]


class TestParrot(EngineContractSuite):
    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = load_plugin("engines", "parrot")()
            engine.start(spec)
            return engine

        return make
