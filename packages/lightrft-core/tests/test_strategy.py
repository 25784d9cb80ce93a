from __future__ import annotations

import argparse
import inspect
import os
from typing import Any
from unittest import mock

import pytest
import torch

from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig, get_fake_strategy, get_strategy
from lightrft.strategy.errors import ConfigError, EngineStateError, PluginError, RolloutError

ABSTRACT = {
    "setup_distributed",
    "create_optimizer",
    "prepare",
    "backward",
    "optimizer_step",
    "save_ckpt",
    "load_ckpt",
}


def test_abstract_are_the_documents_seven() -> None:
    assert set(StrategyBase.__abstractmethods__) == ABSTRACT
    with pytest.raises(TypeError, match="abstract"):
        StrategyBase()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "args",
    [
        argparse.Namespace(strategy="fake", seed=3),
        {"strategy": "fake", "seed": 3},
        StrategyConfig(strategy="fake", seed=3),
    ],
)
def test_the_factory_takes_any_settings_and_keeps_them(args: Any) -> None:
    strategy = get_strategy(args)
    assert isinstance(strategy, FakeStrategy)
    assert strategy.args is args
    assert strategy.config.seed == 3


def test_wrong_settings_are_refused_before_a_backend_is_looked_for() -> None:
    with pytest.raises(ConfigError) as error:
        get_strategy({"strategy": "no_such", "seed": -1, "zero_stage": 7})
    assert len(error.value.problems) == 2


def test_an_unknown_backend_is_answered_with_the_installed_ones() -> None:
    with pytest.raises(PluginError, match=r"no_such: no such strategy is installed \(installed: .*fake"):
        get_strategy({"strategy": "no_such"})


def test_older_scripts_constructor_keywords_are_taken() -> None:
    strategy = FakeStrategy(seed=5, max_norm=0.5, micro_train_batch_size=2, train_batch_size=8, args=None)
    assert strategy.config.seed == 5
    assert strategy.config.max_norm == 0.5
    assert strategy.accumulated_gradient == 4
    assert isinstance(get_fake_strategy(), FakeStrategy)


@pytest.mark.parametrize(
    ("launcher", "given", "index", "seen"),
    [(None, 3, 3, "3"), ("1", 3, 1, "1"), (None, -1, 0, None), (None, 9, 1, "9")],
    ids=["the flag", "the launcher wins", "neither", "more than devices"],
)
def test_the_local_rank_comes_from_the_launcher_or_else_the_flag(
    launcher: str | None, given: int, index: int, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", launcher or "")  # so that it is put back
    if launcher is None:
        monkeypatch.delenv("LOCAL_RANK")
    config = StrategyConfig(local_rank=given)
    with monkeypatch.context() as accelerators:
        accelerators.setattr(torch.accelerator, "is_available", lambda: True)
        accelerators.setattr(torch.accelerator, "device_count", lambda: 4)
        accelerators.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
        assert FakeStrategy(args=config).device.index == index
    FakeStrategy(args=config).setup_distributed()
    assert os.environ.get("LOCAL_RANK") == seen, "libraries look there"


def test_a_fake_strategy_constructs_anywhere_and_steps_at_every_backward() -> None:
    strategy = FakeStrategy()
    model = torch.nn.Linear(2, 1)
    optimizer = strategy.create_optimizer(model)
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    assert strategy.optimizer_step(optimizer, model).stepped


def test_a_step_whose_backward_was_forgotten_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FakeStrategy(micro_train_batch_size=1, train_batch_size=2)
    model = torch.nn.Linear(2, 1)
    optimizer = strategy.create_optimizer(model)
    for _ in range(2):
        strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model)
    assert not caplog.messages, "a step between the boundaries of an accumulation is none"
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        assert not strategy.optimizer_step(optimizer, model, name="actor").stepped
    (told,) = caplog.messages
    assert told.startswith("actor: optimizer_step does nothing: no strategy.backward(loss, model, optimizer) came")


@pytest.mark.parametrize(("method", "added"), [("backward", {"scale", "boundary"}), ("prepare", {"trainable"})])
def test_what_we_add_to_the_documents_is_by_keyword_only(method: str, added: set[str]) -> None:
    parameters = inspect.signature(getattr(StrategyBase, method)).parameters
    assert {name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY} >= added


def test_a_move_clears_the_devices_cache_only_where_bytes_moved() -> None:
    strategy, model = FakeStrategy(), torch.nn.Linear(2, 1)
    with mock.patch.object(strategy, "sync_and_clear_cache") as cleared:
        assert strategy.reload_model(model).nbytes == 0
        cleared.assert_not_called()
        assert strategy.move(model, "meta").nbytes == 12
        cleared.assert_called_once()


def test_what_broke_a_sync_is_not_hidden_by_what_breaks_after_it() -> None:
    strategy, model = FakeStrategy(), torch.nn.Linear(2, 1)
    strategy.setup_inference_engine(None, "minimal", actor=model)
    died, gone = RolloutError("the engine's process died"), EngineStateError("no such process")
    with (
        mock.patch.object(strategy.inference_engine, "load_bucket", side_effect=died),
        mock.patch.object(strategy.inference_engine, "abort_update", side_effect=gone),
        pytest.raises(RolloutError, match="process died"),
    ):
        strategy.update_engine_weights(model)


def test_a_moving_average_takes_whole_numbers_as_they_are() -> None:
    strategy, model, average = FakeStrategy(), torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    model(torch.randn(4, 2))
    strategy.moving_average(model, average, beta=0.5)
    assert average.num_batches_tracked == 1
    assert torch.equal(average.running_mean, model.running_mean / 2)


def test_arguments_in_the_wrong_order_are_no_step_that_does_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    strategy = FakeStrategy()
    optimizer = strategy.create_optimizer(model)
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    swapped: Any = (model, optimizer)
    with pytest.raises(TypeError, match=r"AdamW is no model; .*optimizer_step\(optimizer, model, scheduler\)"):
        strategy.optimizer_step(*swapped)
