from __future__ import annotations

import json
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import PluginError
from lightrft.trainer.metrics import JsonlSink, TensorBoardSink, make_sinks, read_metrics


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"reward_mean": 0.5, "kl": None})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "reward_mean": 0.5, "kl": None}]
    sink.close()


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.log(1, {"grad_norm": float("nan"), "loss": float("inf")})
    sink.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "grad_norm": None, "loss": None}


def test_a_resumed_run_writes_its_steps_again_and_keeps_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = JsonlSink(path)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    again = JsonlSink(path, first_step=3)
    again.log(3, {"loss": 2.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_new_run_does_not_continue_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    JsonlSink(path, first_step=1).close()
    assert read_metrics(path) == []


def test_tensorboard_is_used_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    sinks = make_sinks(StrategyConfig(), tmp_path, tmp_path)
    assert [type(sink) for sink in sinks] == [JsonlSink, TensorBoardSink]
    for sink in sinks:
        sink.log(1, {"loss": 0.5, "kl": None})
        sink.close()
    assert list((tmp_path / "tensorboard").iterdir())
    sinks = make_sinks(StrategyConfig(use_tensorboard=False), tmp_path, tmp_path)
    assert [type(sink) for sink in sinks] == [JsonlSink]
    sinks[0].close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightrft.trainer.metrics.find_spec", lambda _: None)
    with pytest.raises(PluginError, match=rf"lightrft-trainer\[{name}\]"):
        make_sinks(StrategyConfig(**{f"use_{name}": True}), tmp_path, tmp_path)


class Tracker(ModuleType):
    """What a tracker's module is called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for function in ("init", "log", "finish"):
            setattr(self, function, partial(self._call, function))

    def _call(self, function: str, *args: Any, **options: Any) -> None:
        self.calls.append((function, args, options))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_tracker_that_is_asked_for_is_told_the_run_and_its_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = {module: Tracker(module) for module in ("wandb", "trackio")}
    for module, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, module, tracker)
    config = StrategyConfig(
        **{f"use_{name}": True}, wandb_project="digits", wandb_run_name="tenth", use_tensorboard=False
    )
    for sink in make_sinks(config, tmp_path, tmp_path / "logs"):
        sink.log(3, {"loss": 0.5, "kl": None, "sample_versions": {"1": 32}})
        sink.close()
    asked = trackers.pop(name)
    (begun, _, run), logged, ended = asked.calls
    assert (begun, run["project"], run["name"], run["config"]) == ("init", "digits", "tenth", config.to_dict())
    assert run.get("dir") == (str(tmp_path / "logs") if name == "wandb" else None)
    assert logged == ("log", ({"loss": 0.5},), {"step": 3})
    assert ended == ("finish", (), {})
    assert [tracker.calls for tracker in trackers.values()] == [[]]
