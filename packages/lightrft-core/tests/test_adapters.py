"""LoRA adapters of peft's in a model: found, merged, refused where they are more than a product."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lightrft.strategy.adapters import find_adapters, merge, merge_flat, without_adapters
from lightrft.strategy.errors import HubLayoutError
from lightrft.strategy.hub_layout import HubLayout
from lightrft.testing.tiny_models import tiny_model


def adapted(kind: str = "qwen2", **options: Any) -> Any:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "o_proj"], **options})
    return inject_adapter_in_model(config, tiny_model(kind))


def test_adapters_are_known_by_the_weight_that_they_add_to() -> None:
    found = find_adapters(adapted(lora_alpha=6))
    assert len(found) == 2 * 2
    adapter = found["model.layers.1.self_attn.o_proj.base_layer.weight"]
    assert (adapter.layer, adapter.scaling) == ("model.layers.1.self_attn.o_proj", 3.0)
    assert adapter.a == "model.layers.1.self_attn.o_proj.lora_A.default.weight"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "qwen2_vl"])
def test_the_hub_knows_the_plain_names_and_the_adapters_apart(kind: str) -> None:
    layout, plain = HubLayout(adapted(kind, target_modules=["q_proj"])), HubLayout(tiny_model(kind))
    assert [(s.name, s.shape, s.dtype) for s in layout.specs] == [(s.name, s.shape, s.dtype) for s in plain.specs]
    names = {spec.name for spec in layout.specs_of("adapter")}
    assert len(names) == 2 * len(layout.adapters)
    assert all(name.startswith("base_model.model.") and ".default" not in name for name in names)
    assert plain.specs_of("adapter") == []


@pytest.mark.parametrize("start", [0, 1, 5, 7, 34, 35])
@pytest.mark.parametrize("numel", [0, 1, 6, 17, 35])
def test_a_flat_range_is_that_part_of_the_merged_weight(start: int, numel: int) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    whole = merge(weight, a, b, 0.5)
    assert torch.allclose(whole, weight + 0.5 * b @ a)
    part = weight.view(-1)[start : start + numel]
    assert torch.allclose(merge_flat(part, start, a, b, 0.5), whole.view(-1)[start : start + numel])


def test_16_bit_weights_are_merged_in_fp32() -> None:
    weight, a, b = torch.ones(2, 2, dtype=torch.bfloat16), torch.full((1, 2), 2.0**-10), torch.ones(2, 1)
    assert torch.equal(merge(weight, a, b, 1.0), torch.full((2, 2), 1 + 2.0**-10))


def test_adapters_are_left_out_for_a_while_also_when_something_raises() -> None:
    model, ids = adapted(init_lora_weights=False), torch.tensor([[5, 6, 7]])
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with contextlib.suppress(KeyError), without_adapters(model):
        assert torch.equal(model(ids).logits, tiny_model("qwen2")(ids).logits)
        assert [parameter.requires_grad for parameter in model.parameters()] == trained
        raise KeyError
    assert not torch.allclose(model(ids).logits, tiny_model("qwen2")(ids).logits)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "an adapter with a bias"),
        ({"target_modules": ["embed_tokens"]}, "an adapter on a Embedding"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(HubLayoutError, match=problem):
        HubLayout(adapted(**options))


def test_an_adapter_on_a_shared_weight_is_refused() -> None:
    """On the hub it is one tensor, but only one of its uses is adapted."""
    model: Any = tiny_model("qwen2")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(HubLayoutError, match=r"layers\.0\.self_attn\.q_proj: an adapter on a weight that other layers"):
        HubLayout(model)


def test_a_second_adapter_is_refused_and_one_that_is_merged_already() -> None:
    model = adapted()
    layer = model.model.layers[0].self_attn.q_proj
    layer.merge()
    with pytest.raises(HubLayoutError, match=r"layers\.0\.self_attn\.q_proj: an adapter that is already merged"):
        HubLayout(model)
    layer.unmerge()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model, "other")
    with pytest.raises(HubLayoutError, match=r"2 adapters \(default, other\)"):
        HubLayout(model)
