from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from lightrft.engines.hf import HFEngine, step_graphs
from lightrft.strategy.device import local_device
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.testing.engine_claims.generation import GenerationClaims
from lightrft.testing.engine_claims.images import ImageClaims
from lightrft.testing.engine_claims.text import TextClaims
from lightrft.testing.engine_suite import EngineSuite


class _OfHF:
    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = HFEngine()
            engine.start(spec)
            return engine

        return make


class TestHFEngine(_OfHF, EngineSuite):
    text_kinds = ("qwen2", "qwen2_tied", "qwen2_sliding", "mistral", "qwen3", "qwen3_moe", "llama")


@pytest.mark.gpu
class TestHFEngineOnAnAccelerator(TestHFEngine):
    """Models, caches and draws on a device, against Hugging Face on the CPU."""

    spec_options: ClassVar[Mapping[str, Any]] = {"device": local_device()}

    @pytest.fixture(autouse=True)
    def replayed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also the few tokens that most claims generate are decoded by CUDA graphs."""
        monkeypatch.setattr(step_graphs, "_WORTH", 1)


class TestHFEngineInSmallBatches(_OfHF, GenerationClaims, TextClaims, ImageClaims):
    """Three rows at once: samples wait, and take the places of those that finished."""

    spec_options: ClassVar[Mapping[str, Any]] = {"max_batch_size": 3}
    text_kinds = ("qwen2",)
    vision_kinds = ("qwen2_vl",)
    samples = 300
