from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.memory import memory_figures
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.engine_suite import GREEDY, PROMPTS, EngineSuite, push_weights, requests_for, tokens_of

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -t vllm brings it")

from lightrft.engines.vllm import VLLMEngine

# The default cache would be sized for 64 full sequences.
SMALL: Mapping[str, Any] = {"extra": {"kv_cache_memory_bytes": 16 * 2**20}}


class TestVLLMEngine(EngineSuite):
    spec_options: ClassVar[Mapping[str, Any]] = SMALL
    starts_slowly = True  # on the ranks of a launch (``full``) each test has an engine of its own
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

    def test_sleep_gives_memory_back_to_the_system(self, make_engine: Any, model_folder: str, other_model: Any) -> None:
        cache = 128 * 2**20
        engine = make_engine(replace(self.spec(model_folder), extra={"kv_cache_memory_bytes": cache}))
        try:
            push_weights(engine, other_model, version=1)  # which clears the cache, so that it is really there
            before, awake = tokens_of(engine.generate(requests_for(PROMPTS, GREEDY))), resident()
            freed = engine.release("kv_cache") + engine.release("weights")
            assert freed == pytest.approx(cache, rel=0.05)
            assert awake - resident() == pytest.approx(freed, rel=0.1)
            engine.restore("weights")
            engine.restore("kv_cache")
            assert tokens_of(engine.generate(requests_for(PROMPTS, GREEDY))) == before
        finally:
            engine.shutdown()


def resident() -> float:
    """Bytes of this process."""
    return memory_figures(torch.device("cpu"))["rss"] * 2**30
