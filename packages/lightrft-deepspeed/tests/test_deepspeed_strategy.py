"""The standard suite on ZeRO 1, 2 and 3."""

from __future__ import annotations

from typing import Any

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.testing import StrategySuite


class _Suite(StrategySuite):
    world_size = 2
    zero_stage = 2

    @classmethod
    def make_strategy(cls, **settings: Any) -> DeepspeedStrategy:
        return DeepspeedStrategy(**{"zero_stage": cls.zero_stage, **settings})


class TestZero1(_Suite):
    zero_stage = 1


class TestZero2(_Suite):
    zero_stage = 2


class TestZero3(_Suite):
    zero_stage = 3


del StrategySuite, _Suite
