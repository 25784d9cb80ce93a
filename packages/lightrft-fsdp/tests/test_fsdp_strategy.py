"""FSDPV2Strategy keeps every claim of the standard suite: on two ranks, in full runs on one, and on an accelerator."""

from __future__ import annotations

from typing import Any

import pytest

from lightrft.fsdp import FSDPV2Strategy
from lightrft.testing import StrategySuite


class TestFSDPOnTwoRanks(StrategySuite):
    """Sharded over two gloo ranks."""

    world_size = 2

    @classmethod
    def make_strategy(cls, **settings: Any) -> FSDPV2Strategy:
        return FSDPV2Strategy(**settings)


@pytest.mark.full
class TestFSDPOnOneRank(TestFSDPOnTwoRanks):
    """Nothing to shard: the plain module, the same meaning."""

    world_size = 1


@pytest.mark.gpu
class TestFSDPOnAnAccelerator(TestFSDPOnTwoRanks):
    """One rank on a device of its own, over that device's own collectives."""

    world_size = 1
