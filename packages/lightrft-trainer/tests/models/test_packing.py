"""Samples of a packed row: the numbers of each alone, and nothing of its neighbours."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightrft.models import Actor, ActorVL, Critic, pad_rows, segment_attention
from lightrft.strategy.device import attends_in_segments
from lightrft.testing.tiny_models import TEXT_KINDS, tiny_config, tiny_model

# The last two are of one length, and computed as a batch.
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4], [3, 3, 3, 9, 9, 8], [6, 5, 4, 3, 3, 3, 3, 3]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2], [7, 8, 9, 7, 8, 9, 7, 8, 9, 2], [9, 8, 7, 6, 6, 8, 9, 2]]
ROWS = pad_rows(PROMPTS, RESPONSES, pad_token_id=0)
# Sliding windows of 8 tokens, shorter than the longest sample.
KINDS = [*TEXT_KINDS, "qwen2_sliding", "mistral"]
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def gradients(module: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model says of the rows, and the gradient of a weighted sum of it."""
    values = module(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, **options)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    (values * weights).sum().backward()
    return values.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.allclose(ours[0], theirs[0], atol=5e-6), (ours[0] - theirs[0]).abs().max()
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_have_the_logprobs_and_gradients_of_padded_ones(kind: str, checkpointing: bool):
    model = tiny_model(kind)
    packed = Actor(copy.deepcopy(model), packing_samples=True, gradient_checkpointing=checkpointing).train()
    assert_same(gradients(packed, temperature=0.7), gradients(Actor(model).train(), temperature=0.7))


def test_packed_rows_have_the_values_of_padded_ones():
    torch.manual_seed(0)
    plain = Critic(tiny_config("qwen2"))
    nn.init.normal_(plain.value_head.weight)
    packed = Critic(copy.deepcopy(plain.model), packing_samples=True)
    packed.value_head.load_state_dict(plain.value_head.state_dict())
    assert_same(gradients(packed), gradients(plain))


def test_the_model_sees_one_row_without_padding():
    actor = Actor(tiny_model("qwen2"), packing_samples=True)
    seen: list[tuple[int, ...]] = []
    actor.model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    assert seen == [(1, sum(map(len, PROMPTS)) + sum(map(len, RESPONSES)))]


@pytest.mark.parametrize("sample", [1, 3])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "mistral"])
def test_a_sample_moves_none_of_its_neighbours(kind: str, sample: int):
    actor = Actor(tiny_model(kind), packing_samples=True)
    other = ROWS.sequences.clone()
    other[sample, :10] = torch.randint(3, 500, (10,), generator=torch.Generator().manual_seed(1))
    neighbours = [row for row in range(len(PROMPTS)) if row != sample]
    embedding = actor.model.get_input_embeddings().weight
    found = []
    for sequences in (ROWS.sequences, other):
        logprobs = actor(sequences, ROWS.attention_mask, ROWS.response_mask)
        # Through the loss as well: the neighbours' gradient does not know the sample.
        (gradient,) = torch.autograd.grad(logprobs[neighbours].sum(), embedding)
        found.append((logprobs.detach(), gradient))
    (before, gradient), (after, moved) = found
    assert torch.equal(before[neighbours], after[neighbours]) and torch.equal(gradient, moved)
    assert not torch.equal(before[sample], after[sample])


def test_a_row_without_response_tokens_still_reaches_every_parameter():
    actor = Actor(tiny_model("qwen2"), packing_samples=True)
    actor(ROWS.sequences, ROWS.attention_mask, torch.zeros_like(ROWS.response_mask)).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in actor.parameters())


def test_the_model_itself_still_attends_as_transformers_does():
    model = tiny_model("qwen2")
    padded_left = {"input_ids": ROWS.sequences.flip(1), "attention_mask": ROWS.attention_mask.flip(1)}
    with torch.no_grad():
        expected = model(**padded_left).logits
        actor = Actor(copy.deepcopy(model), packing_samples=True)
        assert torch.equal(actor.model(**padded_left).logits, expected)
        assert torch.equal(copy.deepcopy(actor).model(**padded_left).logits, expected)


@pytest.mark.parametrize("build", [Actor, Critic])
def test_a_router_that_would_give_its_auxiliary_loss_changes_nothing(build: Any):
    """Some mixtures of experts ask for it in their configuration; it is no part of what is learned here."""
    torch.manual_seed(0)
    plain = build(tiny_model("qwen3_moe") if build is Actor else tiny_config("qwen3_moe"))
    if build is Critic:
        nn.init.normal_(plain.value_head.weight)
    asking = copy.deepcopy(plain)
    asking.model.config.output_router_logits = True
    packed = build(copy.deepcopy(asking.model), packing_samples=True)
    packed.load_state_dict(plain.state_dict())
    expected = gradients(plain.train())
    assert_same(gradients(asking.train()), expected)
    assert_same(gradients(packed.train()), expected)


# ---- flash attention -------------------------------------------------------------------------------------------------
def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What flash_attn_varlen_func documents, by plain products: ``[tokens, heads, width]``, a batch end to end."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0.0
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(cu_seqlens_q[-1]) == len(q) == len(k) == len(v)
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    left, right = window_size
    outs = []
    for query, key, value in zip(*(part.split(lengths) for part in (q, k, v)), strict=True):
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        key, value = (part.repeat_interleave(len(query) // len(part), dim=0) for part in (key, value))
        ahead = torch.arange(query.shape[1])[None] - torch.arange(query.shape[1])[:, None]
        hidden = (ahead > 0 if causal else ahead > ahead.max()) | ((right >= 0) & (ahead > right))
        hidden |= (left >= 0) & (ahead < -left)
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outs)


def latent() -> Any:
    """A model whose values (16) are narrower than its keys (32)."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    shape = {name: getattr(tiny_config("qwen2"), name) for name in SHAPE} | {"num_key_value_heads": 2}
    widths = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**shape, **widths, first_k_dense_replace=2))


FLASH_KINDS = ["qwen2", "qwen3", "qwen2_sliding", "mistral"]


@pytest.mark.parametrize("kind", FLASH_KINDS)
def test_flash_attention_is_asked_for_each_sample_alone(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(kind)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    expected = gradients(Actor(copy.deepcopy(model)).train())
    model.config._attn_implementation = "flash_attention_2"
    assert_same(gradients(Actor(model, packing_samples=True).train()), expected)


def test_flash_attention_is_given_values_as_wide_as_keys(monkeypatch: pytest.MonkeyPatch):
    def equally_wide(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        return varlen(q, k, v, **options)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=equally_wide))
    model = latent()
    expected = gradients(Actor(copy.deepcopy(model)).train())
    model.config._attn_implementation = "flash_attention_2"
    assert_same(gradients(Actor(model, packing_samples=True).train()), expected)


def test_a_direct_call_asks_transformers_for_flash_attention_by_its_own_name(monkeypatch: pytest.MonkeyPatch):
    from transformers import AttentionInterface

    asked, own = [], AttentionInterface()["sdpa"]

    def flash(module: Any, *tensors: Any, **options: Any) -> Any:
        asked.append((module.config._attn_implementation, module.config.hidden_size, module.layer_idx))
        return own(module, *tensors, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model = tiny_model("qwen2")
    tokens = ROWS.sequences[3:4]
    with torch.no_grad():
        expected = model(tokens).logits
        model.config._attn_implementation = "flash_attention_2"
        packed = Actor(model, packing_samples=True)
        assert torch.equal(packed.model(tokens).logits, expected)
    assert asked == [("flash_attention_2", 64, layer) for layer in range(2)]
    assert packed.config._attn_implementation == "lightrft_flash_attention_2"


def test_flash_attention_is_given_16_bit_under_autocast_though_positions_are_fp32(monkeypatch: pytest.MonkeyPatch):
    given = set()

    def record(*tensors: Tensor, **options: Any) -> Tensor:
        given.update(part.dtype for part in tensors)
        return varlen(*tensors, **options)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=record))
    model = tiny_model("qwen2")
    model.config._attn_implementation = "flash_attention_2"
    with torch.autocast("cpu", torch.bfloat16):
        Actor(model, packing_samples=True)(ROWS.sequences, ROWS.attention_mask)
    assert given == {torch.bfloat16}


@pytest.mark.parametrize("kind", FLASH_KINDS)
def test_torchs_own_kernel_is_asked_for_each_sample_alone(kind: str, monkeypatch: pytest.MonkeyPatch):
    from torch.nn.attention import varlen as module

    asked = []

    def varlen_attn(*tensors: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        asked.append(enable_gqa)
        causal = window_size[1] == 0
        window = (-1, -1) if window_size[0] < 0 else window_size
        return varlen(*tensors, softmax_scale=scale, causal=causal, window_size=window)

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(segment_attention, "attends_in_segments", lambda device, dtype: True)
    model = tiny_model(kind)
    expected = gradients(Actor(copy.deepcopy(model)).train())
    assert not asked
    assert_same(gradients(Actor(model, packing_samples=True).train()), expected)
    assert asked and all(asked)


def test_torchs_own_kernel_is_not_asked_for_values_narrower_than_keys(monkeypatch: pytest.MonkeyPatch):
    from torch.nn.attention import varlen as module

    monkeypatch.setattr(module, "varlen_attn", lambda *_, **__: pytest.fail("it takes one width"))
    monkeypatch.setattr(segment_attention, "attends_in_segments", lambda device, dtype: True)
    model = latent()
    expected = gradients(Actor(copy.deepcopy(model)).train())
    assert_same(gradients(Actor(model, packing_samples=True).train()), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("kind", FLASH_KINDS)
def test_kernels_of_variable_lengths_pack_as_plain_attention_pads(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """sdpa: where a device has torch's own kernel, it computes what is packed."""
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="pip install flash-attn: the kernel of --flash_attn is not installed")
    device = torch.accelerator.current_accelerator()
    ran, own = [], segment_attention._torch_flash
    monkeypatch.setattr(
        segment_attention, "_torch_flash", lambda *args, **options: ran.append(1) or own(*args, **options)
    )
    exact, packing = tiny_model(kind).to(device), tiny_model(kind, dtype=torch.bfloat16).to(device)
    plain = Actor(copy.deepcopy(packing))
    plain.shares_prompts = False
    packing.config._attn_implementation = implementation
    found = []
    for actor in (Actor(exact), plain, Actor(packing, packing_samples=True)):
        logprobs = actor(*(part.to(device) for part in (ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)))
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for _, p in sorted(actor.named_parameters())])  # type: ignore[union-attr]
        found.append((logprobs.detach(), gradient))
    for true, padded, packed in zip(*found, strict=True):
        assert (packed - true).norm() < 2 * (padded - true).norm()
    has_kernel = attends_in_segments(device, torch.bfloat16)
    assert len(ran) == (packing.config.num_hidden_layers if implementation == "sdpa" and has_kernel else 0)
    other = ROWS.sequences.clone()
    other[1, :10] = torch.randint(3, 500, (10,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # `actor` is the packed one
        moved = actor(*(part.to(device) for part in (other, ROWS.attention_mask, ROWS.response_mask)))
    neighbours = [0, 2, 3, 4]
    assert torch.equal(moved[neighbours], found[2][0][neighbours]) and not torch.equal(moved[1], found[2][0][1])


def test_attention_that_would_leak_is_refused_by_name():
    for change, words in [
        ({"_attn_implementation": "flex_attention"}, "attention implementation 'flex_attention' would let the samples"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "has linear_attention layers, which carry state"),
    ]:
        model = tiny_model("qwen2")
        for name, value in change.items():
            setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"--packing_samples: .*{words}"):
            Actor(model, packing_samples=True)
    model = tiny_model("qwen2")
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match=r"--packing_samples: Qwen2ForCausalLM computes attention itself"):
        Actor(model, packing_samples=True)


def test_a_variant_of_attention_that_is_not_computed_is_refused_by_name():
    from transformers import Gemma2Config

    shape = {name: getattr(tiny_config("qwen2"), name) for name in SHAPE}
    config = Gemma2Config(**shape, num_key_value_heads=2, head_dim=32)
    with pytest.raises(ValueError, match=r"Gemma2Attention attends with softcap.*drop --packing_samples"):
        Actor(config, packing_samples=True)(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)


def test_a_model_that_keeps_the_layout_from_its_layers_is_refused_by_name():
    model = tiny_model("qwen2")
    attention = model.model.layers[1].self_attn
    told = attention.forward
    attention.forward = lambda row_layout, **inputs: told(**inputs)
    with pytest.raises(ValueError, match=r"Qwen2Attention was not told .*drop --packing_samples and --sp_size"):
        Actor(model, packing_samples=True)(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)


def test_a_single_token_under_a_mask_of_its_own_is_attended_to_as_transformers_does():
    model = tiny_model("qwen2")
    one = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.zeros(1, 1, 1, 1)}
    with torch.no_grad():
        expected = model(**one).logits
        assert torch.equal(Actor(copy.deepcopy(model), packing_samples=True).model(**one).logits, expected)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_images_keep_their_samples_and_their_places(kind: str):
    model = tiny_model(kind)
    config = model.config
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    patch = config.vision_config.patch_size
    depth = 3 * config.vision_config.temporal_patch_size * patch * patch
    pixels = torch.randn(16 + 32, depth, generator=torch.Generator().manual_seed(1))
    image, start, end = config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
    prompts = [[start, *[image] * 4, end, 20, 21], [9, 9], [30, start, *[image] * 8, end, 31]]
    rows = pad_rows(prompts, [[40, 41, 42], [7, 7, 7], [50]], pad_token_id=0)
    found = []
    for packing in (False, True):
        actor = ActorVL(copy.deepcopy(model), packing_samples=packing)
        for images in ({"pixel_values": pixels, "image_grid_thw": grid}, {}):
            sequences = rows.sequences if images else rows.sequences.masked_fill(rows.sequences == image, 9)
            with torch.no_grad():
                found.append(actor(sequences, rows.attention_mask, rows.response_mask, **images))
    for plain, packed in ((found[0], found[2]), (found[1], found[3])):
        assert torch.allclose(plain, packed, atol=1e-5), (plain - packed).abs().max()
