from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.engine_suite import EngineSuite, requests_for, tokens_of

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

    def test_seeded_prompts_may_be_more_than_one_step_reads(self, make_engine: Any, model_folder: str) -> None:
        few = {**SMALL["extra"], "max_num_batched_tokens": 256}
        engine = make_engine(replace(self.spec(model_folder, max_model_len=256), extra=few))
        requests = requests_for([range(10 + i, 160 + i) for i in range(4)], SamplingParams(max_tokens=4))
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
        engine.shutdown()
        assert tokens_of(together) == tokens_of(alone)
