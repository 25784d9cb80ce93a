from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightrft.strategy.errors import HubLayoutError
from lightrft.strategy.hub_layout import HubLayout, hub_models, hub_sources, is_pretrained_model, unwrap
from lightrft.testing.tiny_models import tiny_model

KINDS = ["qwen2", "qwen2_tied", "qwen3", "llama", "mistral", "qwen3_moe", "qwen2_vl", "qwen2_5_vl"]


class Actor(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(4, 1)


def views(model: nn.Module) -> dict[str, torch.Tensor]:
    layout, tensors = HubLayout(model), dict(hub_sources(model))
    return {name: hub.view(tensors[hub.source].detach()) for name, hub in layout.by_name.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_values_are_those_that_transformers_saves(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    mine = views(model)
    assert sorted(mine) == sorted(saved)
    assert all(torch.equal(mine[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_hub_tensor_is_a_view_of_the_models_own_memory(kind: str) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        for view in views(model).values():
            view.fill_(0.25)
    assert all(bool((tensor == 0.25).all()) for _, tensor in hub_sources(model)), "and together they cover it"


def test_experts_stand_alone_on_the_hub_and_together_in_the_module() -> None:
    layout = HubLayout(tiny_model("qwen3_moe"))
    experts = [name for name in layout.by_name if "experts.2." in name]
    assert len(experts) == 2 * 3
    for name in experts:
        source = layout.by_name[name].source
        assert "experts.2" not in source
        assert len(layout.by_source[source]) > 1, "one atom, gathered once"
        assert layout.by_name[name].spec.atom == source


def test_tied_weights_travel_once() -> None:
    names = list(HubLayout(tiny_model("qwen2_tied")).by_name)
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_a_wrapper_around_one_model_leaves_no_prefix() -> None:
    layout = HubLayout(Actor(tiny_model("qwen3_moe")))
    plain = HubLayout(tiny_model("qwen3_moe"))
    assert set(layout.by_name) == {*plain.by_name, "head.weight", "head.bias"}


def test_two_models_in_one_keep_their_prefixes_apart() -> None:
    both = nn.ModuleDict({"a": tiny_model("qwen2"), "b": tiny_model("qwen2", seed=1)})
    plain = HubLayout(tiny_model("qwen2")).by_name
    assert set(HubLayout(both).by_name) == {f"{prefix}.{name}" for prefix in "ab" for name in plain}


def test_a_plain_module_keeps_its_own_names_and_its_persistent_buffers() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module[1].register_buffer("passing", torch.ones(1), persistent=False)
    assert set(HubLayout(module).by_name) == set(module.state_dict())


def test_shapes_of_shards_can_be_corrected() -> None:
    module = nn.Linear(4, 2)
    layout = HubLayout(module, {"weight": torch.Size([8, 4])})
    assert layout.by_name["weight"].shape == (8, 4)
    assert layout.by_name["bias"].shape == (2,)


def test_specs_come_in_module_order() -> None:
    model = tiny_model("qwen2")
    assert [spec.atom for spec in HubLayout(model).specs] == [name for name, _ in hub_sources(model)]


def test_whatever_keeps_the_model_under_module_is_unwrapped() -> None:
    model = tiny_model("qwen2")
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module.module = model
    assert unwrap(wrapped) is model
    assert [inner for _, inner in hub_models(wrapped)] == [model]
    assert is_pretrained_model(model)
    assert not is_pretrained_model(nn.Linear(1, 1))


def test_a_conversion_that_mixes_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.core_model_loading as loading

    def mixes(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor + 1 for name, tensor in tensors.items()}

    monkeypatch.setattr(loading, "revert_weight_conversion", mixes)
    with pytest.raises(HubLayoutError, match="is not a view of one module parameter"):
        HubLayout(tiny_model("qwen2"))
