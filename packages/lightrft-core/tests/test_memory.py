from __future__ import annotations

from unittest import mock

import psutil
import pytest
import torch

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.memory import MoveReport, memory_figures


def test_on_a_cpu_the_figures_are_the_process_own() -> None:
    figures = memory_figures(torch.device("cpu"))
    assert set(figures) == {"rss", "available"}
    assert figures["rss"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)
    assert 0 < figures["available"] * 2**30 <= psutil.virtual_memory().total


def test_figures_follow_an_allocation() -> None:
    before = memory_figures(torch.device("cpu"))["rss"]
    block = torch.ones(2**26)  # 256 MiB
    assert memory_figures(torch.device("cpu"))["rss"] - before > 0.2
    assert block.sum() == 2**26


def test_a_move_is_reported_in_words() -> None:
    assert str(MoveReport(nbytes=3 * 2**20, seconds=0.25)) == "3.0 MiB in 0.250 s"


def test_what_was_away_comes_back_to_where_the_strategy_computes() -> None:
    """`meta` is the one other device that every machine has."""
    strategy = FakeStrategy()
    model = strategy.prepare(torch.nn.Linear(2, 2))
    optimizer = strategy.create_optimizer(model)
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model, None)
    strategy.device = torch.device("meta")
    with mock.patch.object(strategy, "sync_and_clear_cache"):
        reports = strategy.maybe_load_optimizer(optimizer), strategy.reload_model(model)
    assert [report.nbytes for report in reports] == [2 * 6 * 4, 6 * 4]
    moved = [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]
    assert {tensor.device.type for tensor in moved} == {"meta"}
