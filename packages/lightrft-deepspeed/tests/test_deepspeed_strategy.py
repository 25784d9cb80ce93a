"""The standard suite on ZeRO 1, 2 and 3."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.testing import StrategySuite


class _Suite(StrategySuite):
    world_size = 2
    zero_stage: ClassVar[int] = 2

    test_a_gradient_spoilt_after_backward_skips_the_step_too = pytest.mark.xfail(
        reason="ZeRO takes gradients into its own buffers during backward; nothing is left to spoil on the parameters",
        strict=True,
    )(StrategySuite.test_a_gradient_spoilt_after_backward_skips_the_step_too)
    test_a_model_may_be_built_without_memory_and_filled_later = pytest.mark.xfail(
        reason="stage 3 shards each parameter as it is made, none is on the meta device; stages 1 and 2 refuse by name",
        strict=True,
    )(StrategySuite.test_a_model_may_be_built_without_memory_and_filled_later)

    @classmethod
    def make_strategy(cls, **settings: Any) -> DeepspeedStrategy:
        return DeepspeedStrategy(**{"zero_stage": cls.zero_stage, **settings})


@pytest.mark.full
class TestZero1(_Suite):
    """Optimizer states are sharded."""

    zero_stage = 1


@pytest.mark.full
class TestZero2(_Suite):
    """Gradients too."""

    zero_stage = 2


class TestZero3(_Suite):
    """Parameters too."""

    zero_stage = 3


del StrategySuite, _Suite
