from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.memory import memory_figures
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.engine_suite import (
    GREEDY,
    PROMPTS,
    EngineSuite,
    greedy_reference,
    push_weights,
    requests_for,
    tokens_of,
)
from lightrft.testing.tiny_models import tiny_config

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -t vllm brings it")

from lightrft.engines.vllm import VLLMEngine

# The default cache would be sized for 64 full sequences.
SMALL: Mapping[str, Any] = {"extra": {"kv_cache_memory_bytes": 16 * 2**20}}

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
)


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


@pytest.mark.full
def test_a_model_of_transformers_code_leaves_the_trainers_of_its_class_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Olmo2Config

    shape = {name: getattr(tiny_config("llama"), name) for name in SHAPE}
    config = Olmo2Config(**shape, pad_token_id=0, bos_token_id=None, eos_token_id=2)
    loaded, trained = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    loaded.save_pretrained(tmp_path)
    engine = VLLMEngine()
    engine.start(EngineSpec(pretrain=str(tmp_path), max_model_len=64, **SMALL))
    try:
        push_weights(engine, trained, version=1)
        found = tokens_of(engine.generate(requests_for(PROMPTS, GREEDY)))
    finally:
        engine.shutdown()
    assert found == [greedy_reference(trained, prompt, 12) for prompt in PROMPTS]


def resident() -> float:
    """Bytes of this process."""
    return memory_figures(torch.device("cpu"))["rss"] * 2**30
