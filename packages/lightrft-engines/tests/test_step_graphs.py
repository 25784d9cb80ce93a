"""Replayed decoding steps, with a stand-in for the device's graph: what it recorded, it runs again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import Qwen2Model

from lightrft.engines.hf import HFEngine, engine, step_graphs
from lightrft.engines.hf.step_graphs import rounded_rows, rounded_slots
from lightrft.strategy.engine import EngineSpec, GenerationRequest, RolloutEngine
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.engine_claims.generation import GenerationClaims
from lightrft.testing.engine_claims.images import ImageClaims
from lightrft.testing.engine_claims.text import TextClaims
from lightrft.testing.engine_suite import PROMPTS
from lightrft.testing.tiny_models import CONFIGS, save_tiny_model


class Recorder:
    """Records a function as a device does: by running it, after a first time; counts what is asked of it."""

    recorded = replayed = 0

    def __init__(self, device: torch.device) -> None:
        assert device == torch.device("cpu"), "the engine's"

    def record(self, launch: Callable[[], object]) -> Callable[[], object]:
        launch()
        launch()
        type(self).recorded += 1

        def replay() -> None:
            type(self).replayed += 1
            launch()

        return replay


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    Recorder.recorded = Recorder.replayed = 0
    monkeypatch.setattr(engine, "replays_graphs", lambda device: True)
    monkeypatch.setattr(engine, "GraphPool", Recorder)
    return Recorder


class TestReplayed(GenerationClaims, TextClaims, ImageClaims):
    """The engine's claims hold with every step replayed, in rows and slots that are rounded up."""

    spec_options: ClassVar[Mapping[str, Any]] = {"max_batch_size": 7}
    text_kinds = ("qwen2_sliding",)
    vision_kinds = ("qwen2_vl",)
    samples = 300

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch: pytest.MonkeyPatch, recorder: type[Recorder]) -> None:
        monkeypatch.setattr(step_graphs, "_WORTH", 1)

    @pytest.fixture
    def make_engine(self) -> Any:
        return started_with


def started_with(spec: EngineSpec) -> RolloutEngine:
    engine = HFEngine()
    engine.start(spec)
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("qwen2_tied", tmp_path_factory.mktemp("tiny"))


def generate(engine: RolloutEngine, tokens: int) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    requests = [GenerationRequest(prompt_token_ids=ids, sampling=sampling) for ids in PROMPTS]
    return [output.output_token_ids for output in engine.generate(requests)]


def test_few_graphs_serve_a_generation(folder: str, recorder: type[Recorder]) -> None:
    """Another is recorded when 64 slots are full, and none for the few tokens that are left at the end."""
    generate(started_with(EngineSpec(pretrain=folder)), 100)
    assert recorder.recorded == 2
    assert recorder.replayed > 90
    recorder.recorded = 0
    generate(started_with(EngineSpec(pretrain=folder)), 8)
    assert recorder.recorded == 0


def test_graphs_outlive_a_generation_and_die_with_the_memory_that_they_use(
    folder: str, recorder: type[Recorder]
) -> None:
    hf = started_with(EngineSpec(pretrain=folder))
    expected = generate(hf, 20)
    assert generate(hf, 20) == expected
    assert recorder.recorded == 1
    for what in ("kv_cache", "weights"):
        hf.release(what, keep=True)
        hf.restore(what)
        recorder.recorded = 0
        assert generate(hf, 20) == expected
        assert recorder.recorded == 1


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if "vl" not in kind])
def test_each_kind_of_model_is_recorded(kind: str, tmp_path: Path, recorder: type[Recorder]) -> None:
    generate(started_with(EngineSpec(pretrain=save_tiny_model(kind, tmp_path))), 20)
    assert recorder.recorded == 1


def test_enforce_eager_records_none(folder: str, recorder: type[Recorder]) -> None:
    generate(started_with(EngineSpec(pretrain=folder, extra={"enforce_eager": True})), 20)
    assert recorder.recorded == 0


def test_a_model_that_cannot_be_recorded_decodes_without(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(started_with(EngineSpec(pretrain=folder)), 20)

    def refuse(self: Recorder, launch: Callable[[], object]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(Recorder, "record", refuse)
    with caplog.at_level(logging.INFO):
        assert generate(started_with(EngineSpec(pretrain=folder)), 20) == expected
    assert [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()] == [
        'engine "hf": Qwen2ForCausalLM decodes without CUDA graphs: operation not permitted when stream is capturing'
    ]


def test_a_model_that_reads_the_caches_length_is_not_recorded(
    folder: str, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be the same in each replay, whatever the rows have become."""
    hf = started_with(EngineSpec(pretrain=folder))
    expected = generate(hf, 20)
    inner = Qwen2Model.forward

    def curious(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["past_key_values"].get_seq_length()
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2Model, "forward", curious)
    recorder.replayed = 0
    assert generate(started_with(EngineSpec(pretrain=folder)), 20) == expected
    assert recorder.replayed == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 33, 64, 65, 255])
def test_rounding_wastes_at_most_half(count: int) -> None:
    assert count <= rounded_rows(count, 1000) <= 1.5 * count
    assert rounded_rows(count, count) == count
    slots = 64 * count
    assert slots <= rounded_slots(slots, 10**6) <= 1.25 * slots + 64
    assert rounded_slots(slots, slots) == slots


def test_a_graph_reads_its_own_memory() -> None:
    """Its inputs are copies at addresses that stay."""
    inputs = step_graphs.StepInputs(
        ids=torch.zeros(2, 1), positions=torch.zeros(2, 1), places=torch.zeros(2), masks=(torch.zeros(2, 64),)
    )
    mine = inputs.clone()
    assert all(
        a.data_ptr() != b.data_ptr() and torch.equal(a, b) for a, b in zip(mine.tensors, inputs.tensors, strict=True)
    )
