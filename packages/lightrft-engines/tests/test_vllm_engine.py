from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.testing.engine_suite import EngineSuite

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -t vllm brings it")

from lightrft.engines.vllm import VLLMEngine

# The default cache would be sized for 64 full sequences.
SMALL: Mapping[str, Any] = {"extra": {"kv_cache_memory_bytes": 16 * 2**20}}


class TestVLLMEngine(EngineSuite):
    spec_options: ClassVar[Mapping[str, Any]] = SMALL
    text_kinds = ("qwen2", "qwen2_tied", "qwen3")
    samples = 1500

    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = VLLMEngine()
            engine.start(spec)
            return engine

        return make
