"""The parts of the vLLM engine that need no vLLM: options, prompts, places in fused weights, the process around it."""

from __future__ import annotations

import gc
import os
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.engines.model_facts import cache_bytes_per_token, end_tokens, image_placeholder
from lightrft.engines.recorded_weights import Piece, find_in_piece
from lightrft.engines.vllm import options, prompts
from lightrft.engines.vllm.process_guard import ProcessGuard
from lightrft.strategy.engine import EngineSpec, GenerationRequest
from lightrft.strategy.errors import NotBuiltError
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.tiny_models import IMAGE_PAD, tiny_config

KNOWN = dict.fromkeys(
    [
        "model",
        "skip_tokenizer_init",
        "dtype",
        "seed",
        "trust_remote_code",
        "tensor_parallel_size",
        "distributed_executor_backend",
        "load_format",
        "gpu_memory_utilization",
        "max_model_len",
        "max_num_seqs",
        "logprobs_mode",
        "kv_cache_memory_bytes",
        "enforce_eager",
        "enable_sleep_mode",
        "limit_mm_per_prompt",
        "moe_backend",
        "distributed_timeout_seconds",
        "block_size",
    ]
)


def arguments(kind: str = "qwen2", **spec: Any) -> dict[str, Any]:
    whole = EngineSpec(**{"pretrain": "somewhere", **spec})
    return options.engine_arguments(whole, "somewhere", tiny_config(kind), KNOWN, distributed=False)


def test_an_images_place_in_a_prompt_has_the_token_that_the_familys_processor_looks_for() -> None:
    from transformers import Gemma3Config

    assert image_placeholder(tiny_config("qwen2_vl")) == IMAGE_PAD
    assert image_placeholder(Gemma3Config(boi_token_index=7, image_token_index=9)) == 7
    assert image_placeholder(tiny_config("qwen2")) is None


def test_a_model_without_attention_is_refused_where_its_cache_would_be_sized() -> None:
    from transformers import MambaConfig

    with pytest.raises(NotBuiltError, match=r"a mamba model has no attention.*use --engine_type hf"):
        cache_bytes_per_token(EngineSpec(pretrain="somewhere"), MambaConfig())


# ---- options ---------------------------------------------------------------------------------------------------------
def test_the_spec_becomes_vllms_arguments() -> None:
    found = arguments(dtype=torch.bfloat16, memory_utilization=0.3, max_batch_size=7, call_timeout=12.5)
    assert (found["dtype"], found["gpu_memory_utilization"], found["max_num_seqs"]) == ("bfloat16", 0.3, 7)
    assert (found["load_format"], found["logprobs_mode"]) == ("auto", "processed_logprobs")
    assert found["distributed_timeout_seconds"] == 13


def test_the_context_is_bounded_by_the_models_positions() -> None:
    assert arguments(max_model_len=100)["max_model_len"] == 100
    assert arguments(max_model_len=10**6)["max_model_len"] == 512


def test_a_model_without_weights_is_born_with_dummies() -> None:
    assert arguments(pretrain=None, model_config=tiny_config("qwen2"))["load_format"] == "dummy"


def test_the_cache_on_a_cpu_is_no_larger_than_its_sequences_need() -> None:
    per_token = 2 * 2 * 1 * 32 * 4  # keys and values, layers, heads, width, bytes
    assert arguments(max_batch_size=3, max_model_len=128)["kv_cache_memory_bytes"] == 3 * 256 * per_token


def test_extra_options_are_vllms_own() -> None:
    assert arguments(extra={"block_size": 32})["block_size"] == 32
    with pytest.raises(ValueError, match="no option blocksize"):
        arguments(extra={"blocksize": 32})
    with pytest.raises(ValueError, match="seed are set by the flags"):
        arguments(extra={"seed": 1})


# ---- prompts ---------------------------------------------------------------------------------------------------------
def read(**request: Any) -> dict[str, Any]:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    reader = prompts.PromptReader("Model", lambda: tokenizer, placeholder=5, context=8, max_images=2)
    return reader.read(GenerationRequest(**request))


def test_text_becomes_ids() -> None:
    assert read(prompt="a bb ccc") == {"prompt_token_ids": [1, 2, 3]}


def test_images_travel_with_one_placeholder_each() -> None:
    assert read(prompt_token_ids=(1, 5, 2, 5), images=("x", "y"))["multi_modal_data"] == {"image": ["x", "y"]}
    with pytest.raises(ValueError, match="1 image placeholders"):
        read(prompt_token_ids=(1, 5, 2), images=("x", "y"))
    with pytest.raises(ValueError, match="at most 2"):
        read(prompt_token_ids=(5, 5, 5), images=("x", "y", "z"))


@pytest.mark.parametrize(("ids", "words"), [((), "empty"), ((1,) * 8, "context of 8")])
def test_a_prompt_that_cannot_be_answered_is_refused(ids: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(prompt_token_ids=ids)


def test_end_tokens_are_ours_to_say() -> None:
    found = prompts.sampling_arguments(SamplingParams(stop_token_ids=(9, 2), top_k=-1), (2, 3), 11)
    assert (found["stop_token_ids"], found["ignore_eos"], found["seed"], found["top_k"]) == ([2, 3, 9], True, 11, 0)
    assert prompts.sampling_arguments(SamplingParams(ignore_eos=True), (2, 3), 1)["stop_token_ids"] == []


def test_end_tokens_come_from_the_generation_settings_first() -> None:
    config = tiny_config("qwen2")
    assert end_tokens(config, SimpleNamespace(eos_token_id=[7, 8])) == (7, 8)
    assert end_tokens(config, None) == (2,)


# ---- places ----------------------------------------------------------------------------------------------------------
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 10_000),
    transposed=st.booleans(),
)
def test_each_position_of_a_part_is_found_and_no_other(shape: tuple[int, ...], seed: int, transposed: bool) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    dice = random.Random(seed)
    part = whole
    for dim, size in enumerate(shape):
        start = dice.randrange(size)
        part = part.narrow(dim, start, dice.randint(1, size - start))
    if transposed:
        part = part.movedim(0, -1)
    piece = Piece(
        shape=tuple(part.shape),
        stride=tuple(part.stride()),
        offset=int(part.storage_offset()),
        target=torch.empty(part.shape),
    )
    at = torch.randperm(whole.numel(), generator=torch.Generator().manual_seed(seed))
    found = find_in_piece(piece, shape, at)
    inside = found >= 0
    assert torch.equal(torch.isin(at, part.contiguous()), inside)
    assert torch.equal(part.reshape(-1)[found[inside]], at[inside])


# ---- the process -----------------------------------------------------------------------------------------------------
def test_what_vllm_does_to_the_process_holds_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    guard, ours, numbers = ProcessGuard(torch.device("cpu")), torch.set_num_threads, torch.get_rng_state()
    of_the_script: list[Any] = []
    gc.freeze()  # as a script may

    def theirs(count: int) -> None:
        """As vLLM's CPU worker has it."""

    with guard:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        torch.set_num_threads = theirs
        torch.manual_seed(5)
        of_vllm: list[Any] = []
        gc.freeze()
    assert os.environ["LOCAL_WORLD_SIZE"] == "8"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert torch.set_num_threads is ours
    assert torch.equal(torch.get_rng_state(), numbers)
    collected = {id(item) for item in gc.get_objects()}  # what is frozen is not among them
    assert id(of_vllm) in collected
    assert id(of_the_script) not in collected
    with guard:
        assert os.environ["LOCAL_WORLD_SIZE"] == "1"
        assert torch.set_num_threads is theirs
    with pytest.raises(KeyError), guard:
        raise KeyError
    assert os.environ["LOCAL_WORLD_SIZE"] == "8"
    assert torch.set_num_threads is ours
