"""Engines with one fault each: the check that must find it finds it, and names the layer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightrft.cli.doctor.examination import examine
from lightrft.cli.doctor.findings import ON_RANKS, Finding, gather
from lightrft.cli.doctor.notebook import Notebook
from lightrft.engines.hf import HFEngine
from lightrft.strategy import registry
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import LightRFTError


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    before = dict(registry._registered["engines"])
    yield
    registry._registered["engines"] = before


def findings(engine: type[HFEngine], **settings: Any) -> dict[str, Finding]:
    """What an examination in this process finds with that engine."""
    registry.register_engine("examined", engine)
    config = StrategyConfig(strategy="fake", engine_type="examined", **settings)
    notebook, end = Notebook(config), None
    try:
        examine(config, notebook)
    except (LightRFTError, OSError, ValueError, ZeroDivisionError) as error:
        end = f"rank 0: {error}"
    return {finding.check: finding for finding in gather({0: notebook.notes}, end)}


def statuses(found: dict[str, Finding]) -> dict[str, str]:
    return {check: found[check].status for check in ON_RANKS if found[check].status != "ok"}


@pytest.mark.parametrize("level", [1, 2])
def test_a_sound_engine_passes(level: int) -> None:
    found = findings(HFEngine, engine_sleep_level=level)
    assert statuses(found) == {}
    assert found["drift"].figures["mean"] < 1e-5
    assert found["drift"].figures["changed"] == 0
    assert found["weight sync"].figures["tensors_changed"] == found["weight sync"].figures["tensors_expected"]
    assert found["sleep"].figures["freed_mib"] > 0


def test_in_bfloat16_the_limits_are_wider() -> None:
    found = findings(HFEngine, bf16=True)
    assert statuses(found) == {}
    assert found["drift"].figures["mean"] > 1e-5


class DoesNotStart(HFEngine):
    def _start(self, spec: Any, group: Any) -> None:
        raise ZeroDivisionError("in a kernel")


def test_an_engine_that_does_not_start_leaves_the_rest_out() -> None:
    found = findings(DoesNotStart)
    assert statuses(found) == {"engine": "failed", **dict.fromkeys(ON_RANKS[4:], "skipped")}
    assert found["engine"].text == "rank 0: ZeroDivisionError: in a kernel"
    assert found["engine"].layer == "the engine 'examined'"
    assert "in _start" in found["engine"].trace


def test_a_folder_without_a_model_is_the_models_fault(tmp_path: Path) -> None:
    found = findings(HFEngine, pretrain=str(tmp_path))
    assert found["model"].status == "failed"
    assert found["model"].layer == "the model's folder"
    assert "--pretrain must be a hub name or a folder" in found["model"].cure


class Forgetful(HFEngine):
    """Acknowledges weights and keeps the old ones."""

    def _load_bucket(self, bucket: Any) -> None:
        pass


def test_a_sync_that_does_not_arrive_is_the_weight_syncs_fault() -> None:
    found = findings(Forgetful)
    assert found["weight sync"].status == "failed"
    assert "values differ" in found["weight sync"].text
    assert found["weight sync"].layer == "the weight sync from 'fake' to 'examined'"


class Boastful(HFEngine):
    """Says that its tokens were likelier than they were."""

    def _generate(self, requests: Any) -> Any:
        outputs = super()._generate(requests)
        for output in outputs:
            output.logprobs = [logprob + 0.1 for logprob in output.logprobs or ()]
        return outputs


def test_drift_is_found_and_the_examination_goes_on() -> None:
    found = findings(Boastful)
    assert statuses(found) == {"drift": "failed"}
    assert found["drift"].figures["mean"] == pytest.approx(0.1, abs=1e-3)
    assert "the same dtype" in found["drift"].cure


class Amnesiac(HFEngine):
    """Wakes with other weights."""

    def _restore(self, what: Any, values: bool) -> None:
        super()._restore(what, values)
        if what == "weights":
            for parameter in self._model.parameters():
                parameter.data.mul_(-1)


def test_an_engine_that_wakes_as_another_is_found_out() -> None:
    found = findings(Amnesiac)
    assert statuses(found) == {"sleep": "failed"}
    assert "--disable_engine_sleep" in found["sleep"].cure


class Sleepless(HFEngine):
    from lightrft.strategy.engine import EngineCapabilities

    capabilities = EngineCapabilities(sleep_levels=(1,))


def test_a_level_that_an_engine_has_not_is_left_out() -> None:
    found = findings(Sleepless, enable_engine_sleep=False, engine_sleep_level=2)
    assert statuses(found) == {"sleep": "skipped"}
    assert "no sleep level 2" in found["sleep"].text


class Beside(HFEngine):
    """Holds memory in a process of its own, and keeps its cache."""

    from lightrft.strategy.engine import EngineCapabilities

    capabilities = EngineCapabilities(keeps_kv_cache_on=("cpu",))

    def _start(self, spec: Any, group: Any) -> None:
        super()._start(spec, group)
        code = "held = b'1' * 2**27; print(flush=True); input()"
        words = [sys.executable, "-c", code]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def _shutdown(self) -> None:
        super()._shutdown()
        self._process.communicate(b"\n")

    def _release(self, what: Any, keep: bool) -> int:
        return 0 if what == "kv_cache" else super()._release(what, keep)


def test_memory_in_an_engines_own_process_is_counted_and_what_sleep_keeps_is_said() -> None:
    found = findings(Beside)
    assert statuses(found) == {}
    assert found["engine"].figures["mib"] > 120
    assert found["engine"].figures["mib_in_processes_of_its_own"] == pytest.approx(128, abs=32)
    assert "of it in processes that it started" in found["engine"].text
    assert found["sleep"].text.startswith("level 1 frees nothing: on a CPU examined keeps its KV cache")


class Mute(HFEngine):
    def _generate(self, requests: Any) -> Any:
        outputs = super()._generate(requests)
        for output in outputs:
            output.logprobs = None
        return outputs


def test_an_engine_without_logprobs_cannot_be_compared_which_is_said() -> None:
    assert statuses(findings(Mute)) == {"drift": "skipped"}
