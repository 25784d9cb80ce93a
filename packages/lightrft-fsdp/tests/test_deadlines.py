"""A rank that is late in a weight export: the others leave in time, and say who."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lightrft.fsdp import FSDPV2Strategy
from lightrft.strategy.errors import RankTimeoutError
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import tiny_model

DEADLINE, LATE = 2.0, 6.0


def export_with_a_late_rank() -> str | None:
    strategy = FSDPV2Strategy(dist_timeout=DEADLINE, micro_train_batch_size=1, train_batch_size=2)
    model = strategy.prepare(tiny_model())
    plan = UpdatePlan(version=1, specs=tuple(strategy.export_spec(model)))
    if strategy.rank == 1:
        strategy.barrier()
        time.sleep(LATE)
        return None
    strategy.barrier()
    with pytest.raises(RankTimeoutError) as caught, strategy.waits_for_ranks("export_weights"):
        list(strategy.export_weights(model, plan))
    return str(caught.value)


def test_a_rank_that_is_late_in_an_export_is_named(ranks: Any) -> None:
    message = ranks.run(export_with_a_late_rank, timeout=60)[0]
    assert message is not None
    assert "export_weights" in message
    assert "rank 1, last seen in barrier" in message
