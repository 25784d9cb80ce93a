"""Families of models, packed: each gives the numbers of padded rows, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from lightrft.models import Actor, pad_rows
from lightrft.models.row_layout import RowLayout
from lightrft.testing.tiny_models import tiny_config, tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4], [3, 3, 3, 9, 9, 8]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2], [7, 8, 9, 7, 8, 9, 7, 8, 9, 2]]
ROWS = pad_rows(PROMPTS, RESPONSES, pad_token_id=0)
CHANGED, NEIGHBOURS = 1, [0, 2, 3]

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
GROUPED = {"num_key_value_heads": 1, "head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Values narrower than keys, experts behind a dense layer, rotations of parts, learned positions, windows.
EQUAL: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "cohere2": {**GROUPED, "sliding_window": 8},
    "deepseek_v3": {**LATENT, **ROUTED, "num_key_value_heads": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3_text": {**GROUPED, "sliding_window": 8, "pad_token_id": 0},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {"pad_token_id": 0, "num_key_value_heads": 1},
    "qwen2_moe": {
        **EXPERTS,
        "num_key_value_heads": 1,
        "shared_expert_intermediate_size": 64,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "camembert": ({"is_decoder": True}, "CamembertForCausalLM counts positions from its padding"),
    "data2vec-text": ({"is_decoder": True}, "Data2VecTextForCausalLM counts positions from its padding"),
    "doge": (GROUPED, "DogeAttention attends with a mask of its own"),
    "falcon": ({}, "FalconForCausalLM computes attention itself"),
    "gemma2": (GROUPED, "Gemma2Attention attends with softcap"),
    "lfm2": (
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        "Lfm2ForCausalLM has conv layers",
    ),
    # Older versions of transformers do not let it attend in another way.
    "nemotron": (
        {"num_key_value_heads": 2},
        "(NemotronAttention was not told how its row is laid out|NemotronForCausalLM computes attention itself)",
    ),
    "recurrent_gemma": ({"num_key_value_heads": 1}, "RecurrentGemmaForCausalLM has recurrent layers"),
    "roberta": ({"is_decoder": True}, "RobertaForCausalLM counts positions from its padding"),
    "xlm-roberta": ({"is_decoder": True}, "XLMRobertaForCausalLM counts positions from its padding"),
}


def build(family: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {name: getattr(tiny_config("qwen2"), name) for name in SHAPE} | {"max_position_embeddings": 128}
    config = AutoConfig.for_model(family, **{**shape, "initializer_range": 0.15, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logprobs(actor: Actor, sequences: torch.Tensor = ROWS.sequences) -> torch.Tensor:
    actor.shares_prompts = False
    return actor.eval()(sequences, ROWS.attention_mask, ROWS.response_mask)


@pytest.mark.parametrize("family", EQUAL)
def test_a_family_that_packs_gives_the_numbers_of_padded_rows_and_keeps_samples_apart(family: str):
    model = build(family, EQUAL[family])
    expected = logprobs(Actor(copy.deepcopy(model)))
    packed = Actor(model, packing_samples=True)
    found = logprobs(packed)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
    other = ROWS.sequences.clone()
    other[CHANGED, :10] = torch.randint(3, 500, (10,), generator=torch.Generator().manual_seed(1))
    moved = logprobs(packed, other)
    # Experts are given as many tokens as the samples send them, and round accordingly.
    assert torch.allclose(moved[NEIGHBOURS], found[NEIGHBOURS], atol=5e-6, rtol=0)
    assert not torch.allclose(moved[CHANGED], found[CHANGED], atol=1e-2)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_samples_would_not_be_alone_is_refused_by_name(family: str):
    options, words = REFUSED[family]
    model = build(family, options)
    with pytest.raises(ValueError, match=f"{words}.*drop (the flag|--packing_samples and --sp_size)"):
        logprobs(Actor(model, packing_samples=True))


def test_a_model_of_which_some_layers_do_not_attend_is_refused_by_name():
    """As one whose configuration does not tell that they are recurrent."""
    model = tiny_model("qwen2")
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM has 2 layers, and attention knew 1 times"):
        logprobs(Actor(model, packing_samples=True))


def test_copies_of_a_layout_count_together():
    """FSDP hands a copy to each layer that it shards."""
    layout = RowLayout.of(ROWS.attention_mask, packed=True, ranks=None)
    dataclasses.replace(layout, mask=layout.mask.clone()).attended.total += 2
    assert layout.attended.total == 2
