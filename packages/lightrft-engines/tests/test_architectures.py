"""Model families whose caches, masks or positions differ: greedy decoding equals ``generate`` for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightrft.engines.hf import HFEngine
from lightrft.engines.hf.attention import decode_attention
from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError
from lightrft.testing.engine_suite import GREEDY, greedy_reference, requests_for, tokens_of

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "learned positions": lambda: hf.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2, eos_token_id=2
    ),
    "windows, soft caps": lambda: hf.Gemma2Config(**TEXT, num_hidden_layers=4, head_dim=32, sliding_window=8),
    "biases by distance": lambda: hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=2),
    "latent keys": lambda: hf.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 2},
        num_hidden_layers=2,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
    "attention beside convolutions": lambda: hf.Lfm2Config(
        **TEXT, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]
    ),
    "attention beside a recurrent state": lambda: hf.Qwen3NextConfig(
        **TEXT,
        **EXPERTS,
        num_hidden_layers=4,
        head_dim=32,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=32,
    ),
    "a recurrent state alone": lambda: hf.Mamba2Config(
        vocab_size=128, hidden_size=64, state_size=16, num_hidden_layers=2, num_heads=8, head_dim=16, n_groups=1
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    model.save_pretrained(tmp_path)
    engine = HFEngine()
    engine.start(EngineSpec(pretrain=str(tmp_path), max_batch_size=5))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(7, 128, (n,), generator=generator).tolist() for n in (5, 17, 3, 5, 40, 5, 17, 1, 9)]
    prompts.append(prompts[0])
    outputs = engine.generate(requests_for(prompts, GREEDY))
    assert tokens_of(outputs) == [greedy_reference(model, prompt, 12) for prompt in prompts]


def test_a_mask_may_differ_between_the_heads_that_share_keys() -> None:
    """Doge's does."""
    query, mask = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 5)
    key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    each = (part.repeat_interleave(2, dim=1) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *each, attn_mask=mask)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    assert torch.allclose(decode_attention(module, query, key, value, mask)[0].transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        hf.OpenAIGPTConfig(vocab_size=128, n_embd=64, n_layer=1, n_head=2),  # nothing is kept
        hf.RwkvConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1),  # under another name
        hf.RecurrentGemmaConfig(**TEXT, num_hidden_layers=2, lru_width=64),  # in its modules
        hf.MiniMaxConfig(**TEXT, num_hidden_layers=2, num_local_experts=2),  # in a class of its own
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_keeps_no_cache_of_transformers_is_refused_by_name(config: Any) -> None:
    with pytest.raises(NotBuiltError, match=r"keeps what it has read in a form of its own.*use --engine_type vllm"):
        HFEngine().start(EngineSpec(model_config=config))
