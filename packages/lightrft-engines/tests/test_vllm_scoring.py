"""Reward models served by vLLM, held against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError
from lightrft.testing.tiny_models import save_tiny_model, tiny_config

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -t vllm brings it")

from lightrft.engines.vllm.scoring import VLLMScoringEngine

SEQUENCES = [[5, 6, 7], list(range(10, 50)), [9], [3] * 17]
# The default cache would be sized for 64 full sequences.
SMALL: dict[str, Any] = {"max_model_len": 64, "extra": {"kv_cache_memory_bytes": 8 * 2**20}}


def save_classifier(folder: Path, outputs: int) -> str:
    torch.manual_seed(outputs)
    config = tiny_config("qwen2")
    config.num_labels, config.pad_token_id = outputs, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_classifier(tmp_path_factory.mktemp("scoring") / "rm", 1)


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[VLLMScoringEngine]:
    engine = VLLMScoringEngine()
    engine.start(EngineSpec(pretrain=folder, **SMALL))
    yield engine
    engine.shutdown()


@torch.no_grad()
def test_scores_are_transformers_own(engine: VLLMScoringEngine, folder: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    expected = [model(torch.tensor([tokens])).logits.item() for tokens in SEQUENCES]
    assert engine.score(SEQUENCES) == pytest.approx(expected, abs=1e-5)


def test_sleep_frees_memory_and_changes_no_score(engine: VLLMScoringEngine) -> None:
    from lightrft.engines.vllm import backend

    before = engine.score(SEQUENCES)
    caches = backend.caches(engine._llm)
    engine.release()
    engine.release()
    assert sum(cache.untyped_storage().nbytes() for cache in caches) == 0
    engine.restore()
    engine.restore()
    assert engine.score(SEQUENCES) == before


@pytest.mark.parametrize("tokens", [[], [1] * 65])
def test_what_has_no_score_is_refused_by_number(engine: VLLMScoringEngine, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=f"sample 1 has {len(tokens)} tokens, the engine accepts 1 to 64"):
        engine.score([[4], tokens])
    assert len(engine.score([[4]])) == 1


@pytest.mark.parametrize("kind", ["a language model", "two outputs"])
def test_a_model_that_gives_no_score_is_refused(kind: str, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path) if kind == "a language model" else save_classifier(tmp_path, 2)
    with pytest.raises(NotBuiltError, match="sequence classifiers with one output"):
        VLLMScoringEngine().start(EngineSpec(pretrain=folder, **SMALL))
