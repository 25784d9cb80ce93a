"""What the embedded engine holds, gives back, and does not disturb."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.engines.hf import HFEngine, decoding
from lightrft.strategy.engine import EngineSpec, GenerationRequest
from lightrft.strategy.errors import PluginError, RolloutError, WeightSyncError
from lightrft.strategy.registry import load_plugin
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.weights import TensorSpec, WeightBucket
from lightrft.testing.engine_suite import (
    GREEDY,
    PROMPTS,
    greedy_reference,
    hub_state,
    push_weights,
    requests_for,
    specs_of,
    tokens_of,
)
from lightrft.testing.tiny_models import save_tiny_model, tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("qwen2_tied", tmp_path_factory.mktemp("tiny"))


def started(folder: str | None, **options: Any) -> HFEngine:
    engine = HFEngine()
    engine.start(EngineSpec(pretrain=folder, **options))
    return engine


def storages(engine: HFEngine) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in engine._model.parameters()}


def test_the_entry_point_leads_here() -> None:
    assert load_plugin("engines", "hf") is HFEngine


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, lightrft.engines.hf; print([m for m in ('transformers', 'vllm', 'sglang') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]"


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r'pip install "lightrft-engines\[hf\]"'):
        HFEngine().start(EngineSpec(pretrain="anything"))


def test_it_needs_a_model() -> None:
    with pytest.raises(ValueError, match="--pretrain"):
        HFEngine().start(EngineSpec())


def test_unknown_options_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"one extra option, enforce_eager .*, got swap_space"):
        started(folder, extra={"swap_space": 4})


def test_level_2_sleep_really_frees_the_weights(folder: str) -> None:
    engine = started(folder)
    held = sum(storages(engine).values())
    assert engine.release("weights", keep=False) == held > 0
    assert sum(storages(engine).values()) == 0
    engine.restore("weights")
    assert sum(storages(engine).values()) == held


def test_level_1_sleep_frees_nothing_where_host_and_device_are_one(folder: str) -> None:
    engine = started(folder)
    held = storages(engine)
    assert engine.release("weights", keep=True) == 0
    assert storages(engine) == held


def test_the_cache_is_kept_between_generations_and_released_whole(folder: str) -> None:
    engine = started(folder)
    assert engine.release("kv_cache") == 0
    engine.restore("kv_cache")
    engine.generate(requests_for(PROMPTS, GREEDY))
    stores = [keys.data_ptr() for keys, _ in engine._cache.stores]
    engine.generate(requests_for(PROMPTS, GREEDY))
    assert [keys.data_ptr() for keys, _ in engine._cache.stores] == stores
    expected = engine._cache.nbytes
    assert engine.release("kv_cache") == expected > 0
    assert engine._cache.nbytes == 0


def test_a_long_answer_makes_the_cache_grow(folder: str) -> None:
    engine, model = started(folder, max_batch_size=2), tiny_model("qwen2_tied")
    sampling = SamplingParams(temperature=0.0, max_tokens=330, ignore_eos=True)
    outputs = engine.generate(requests_for(PROMPTS[:3], sampling))
    assert tokens_of(outputs) == [greedy_reference(model, prompt, 330) for prompt in PROMPTS[:3]]
    assert engine._cache.capacity > 330


def test_noise_made_ahead_follows_its_sample_when_rows_move(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(folder, max_batch_size=3)
    requests = [
        GenerationRequest(
            prompt_token_ids=PROMPTS[i % 3], sampling=SamplingParams(max_tokens=length, seed=i, ignore_eos=True)
        )
        for i, length in enumerate((9, 2, 5, 7, 3, 12, 4))
    ]
    together = engine.generate(requests)
    monkeypatch.setattr(decoding, "tokens_ahead", lambda rows, vocabulary, left: 1)
    for one, other in zip(together, engine.generate(requests), strict=True):
        assert one.output_token_ids == other.output_token_ids and one.logprobs == other.logprobs


def test_an_engine_without_weights_has_right_buffers_and_leaves_the_config_alone() -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    attention = config._attn_implementation
    model = tiny_model("llama", rope_parameters=dict(config.rope_parameters))
    engine = started(None, model_config=config)
    assert config._attn_implementation == attention
    buffers = dict(engine._model.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_engines_dtype(folder: str, dtype: torch.dtype) -> None:
    engine, model = started(folder, dtype=dtype), tiny_model("qwen2_tied", seed=1)
    plan = engine.begin_update(1, specs_of(model))
    assert plan.dtype is dtype
    assert all(spec.dtype is dtype for spec in plan.specs)
    engine.abort_update()
    push_weights(engine, model, version=1)
    state = hub_state(model)
    held = engine.sample_weights({name: torch.arange(t.numel()) for name, t in state.items()})
    assert all(torch.equal(held[name], tensor.to(dtype).reshape(-1)) for name, tensor in state.items())
    outputs = engine.generate(requests_for(PROMPTS, GREEDY))
    assert [len(tokens) for tokens in tokens_of(outputs)] == [12] * len(PROMPTS)


def test_a_tied_weight_may_come_under_both_names_if_they_agree(folder: str) -> None:
    engine, tied = started(folder), tiny_model("qwen2_tied", seed=1)
    state = dict(hub_state(tied))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _send(engine, state)
    assert tokens_of(engine.generate(requests_for(PROMPTS[:1], GREEDY)))[0] == greedy_reference(tied, PROMPTS[0], 12)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        _send(engine, state)


def test_nan_logits_are_an_error_that_names_the_version(folder: str) -> None:
    engine, broken = started(folder), tiny_model("qwen2_tied")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    push_weights(engine, broken, version=4)
    with pytest.raises(RolloutError, match=r"version 4.*NaN"):
        engine.generate(requests_for(PROMPTS, GREEDY))


def test_text_prompts_are_tokenized_by_the_models_own_tokenizer(folder: str) -> None:
    engine = started(folder)
    by_text = engine.generate([GenerationRequest(prompt="count the stones", sampling=GREEDY)])[0]
    by_ids = engine.generate([GenerationRequest(prompt_token_ids=tuple(by_text.prompt_token_ids), sampling=GREEDY)])[0]
    assert by_text.output_token_ids == by_ids.output_token_ids
    blank = started(None, model_config=tiny_config("qwen2"))
    push_weights(blank, tiny_model("qwen2"), version=1)
    with pytest.raises(ValueError, match="send prompt_token_ids"):
        blank.generate([GenerationRequest(prompt="text", sampling=GREEDY)])


def test_the_checkpoint_on_disk_is_not_written_to(folder: str) -> None:
    file = next(Path(folder).glob("*.safetensors"))
    before = file.read_bytes()
    engine = started(folder)
    push_weights(engine, tiny_model("qwen2_tied", seed=1), version=1)
    engine.release("weights", keep=False)
    assert file.read_bytes() == before


def _send(engine: HFEngine, state: dict[str, torch.Tensor]) -> None:
    specs = [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in state.items()]
    engine.begin_update(1, specs)
    engine.load_bucket(WeightBucket(0, state))
    engine.finish_update()
