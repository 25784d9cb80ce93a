from __future__ import annotations

from typing import Any

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.testing.strategy_suite import StrategySuite


class TestFakeStrategy(StrategySuite):
    @classmethod
    def make_strategy(cls, **settings: Any) -> FakeStrategy:
        return FakeStrategy(**settings)
