"""Plug-ins by name. Real distributions that bring one are tests of lightrft-testing."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from lightrft.strategy import registry
from lightrft.strategy.errors import PluginError
from lightrft.strategy.fake_strategy import FakeStrategy


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {"strategies": {}, "engines": {}})


class Mine(FakeStrategy):
    pass


def test_an_installed_name_is_loaded() -> None:
    assert registry.load_plugin("strategies", "fake") is FakeStrategy
    assert "fake" in registry.available("strategies")


def test_a_name_registered_at_run_time_wins() -> None:
    registry.register_strategy("fake", Mine)
    registry.register_strategy("mine", Mine)
    assert registry.load_plugin("strategies", "fake") is Mine
    assert registry.load_plugin("strategies", "mine") is Mine
    assert {"fake", "mine"} <= set(registry.available("strategies"))
    assert "mine" not in registry.available("engines")


def test_engines_are_registered_apart() -> None:
    registry.register_engine("mine", Mine)
    assert registry.load_plugin("engines", "mine") is Mine
    with pytest.raises(PluginError, match="--strategy mine"):
        registry.load_plugin("strategies", "mine")


@pytest.mark.parametrize(
    ("kind", "name", "cure"),
    [
        (
            "strategies",
            "deepspeed",
            r"lightrft-trainer\[deepspeed\].* the other backend is fsdp: .*lightrft-trainer\[fsdp\]",
        ),
        ("strategies", "fsdp", r"lightrft-trainer\[fsdp\].* the other backend is deepspeed: .*\[deepspeed\]"),
        ("engines", "hf", r"lightrft-engines\[hf\]"),
        ("engines", "vllm", r"lightrft-engines\[vllm\]"),
        ("engines", "sglang", r"lightrft-engines\[sglang\]"),
        ("engines", "no_such", "--engine_type"),
    ],
)
def test_a_missing_name_says_what_is_there_and_what_brings_it(
    kind: Any, name: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = EntryPoint("here", "some.module:Thing", f"lightrft.{kind}")
    monkeypatch.setattr(registry, "_entry_points", lambda kind: (there,))
    with pytest.raises(PluginError, match=rf"{name}: no such .*installed: here.*{cure}"):
        registry.load_plugin(kind, name)


@pytest.mark.parametrize(
    ("missing", "there", "flag"), [("deepspeed", "fsdp", "pass --fsdp"), ("fsdp", "deepspeed", "drop --fsdp")]
)
def test_of_the_two_backends_the_one_that_is_there_is_offered(
    missing: str, there: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint(there, "some.module:Thing", "lightrft.strategies")
    monkeypatch.setattr(registry, "_entry_points", lambda kind: (point,))
    with pytest.raises(PluginError, match=rf"{missing}: no such strategy.*lightrft-trainer\[{missing}\].* or {flag}"):
        registry.load_plugin("strategies", missing)


def test_a_package_that_does_not_import_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("vllm", "no_such_module_at_all:Engine", "lightrft.engines")
    monkeypatch.setattr(registry, "_entry_points", lambda kind: (broken,))
    with pytest.raises(PluginError, match=r"cannot be imported .*no_such_module_at_all.*pip install"):
        registry.load_plugin("engines", "vllm")
