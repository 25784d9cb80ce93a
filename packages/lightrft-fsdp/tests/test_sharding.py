"""Which modules become units. No process group is needed to decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightrft.fsdp import sharding
from lightrft.fsdp.sharding import plan_units
from lightrft.testing import tiny_model


def names(model: nn.Module, **options: Any) -> list[str]:
    return [unit.name for unit in plan_units(model, **options)]


class Actor(nn.Module):
    """A transformers model with a head of its own, as trainers wrap it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.value_head = nn.Linear(64, 1)


class Wrapper(nn.Module):
    """What a backend puts around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Blocks(nn.Module):
    """No transformers model: a list of like blocks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)])
        self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.last = nn.Linear(4, 4)


class Experts(nn.Module):
    """A block that chooses among a list of like modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3_moe"])
def test_a_transformers_model_is_cut_at_its_own_blocks(kind: str) -> None:
    assert names(tiny_model(kind)) == ["model.layers.0", "model.layers.1", ""]


def test_a_large_untied_embedding_is_gathered_for_the_forward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LARGE_EMBEDDING", 1)
    units = plan_units(tiny_model("qwen2"))
    assert [unit.name for unit in units] == ["model.layers.0", "model.layers.1", "model.embed_tokens", ""]
    assert [unit.name for unit in units if unit.forward_only] == ["model.embed_tokens"]


def test_a_tied_embedding_stays_with_what_holds_both_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LARGE_EMBEDDING", 1)
    assert names(tiny_model("qwen2_tied")) == ["model.layers.0", "model.layers.1", ""]


def test_a_vision_tower_is_cut_at_its_blocks_too() -> None:
    found = names(tiny_model("qwen2_vl"))
    assert [name for name in found if "visual" in name] == ["model.visual.blocks.0", "model.visual.blocks.1"]
    assert [name for name in found if "layers" in name] == [
        "model.language_model.layers.0",
        "model.language_model.layers.1",
    ]


def test_with_mixed_batches_a_vision_tower_has_no_collectives_of_its_own() -> None:
    units = plan_units(tiny_model("qwen2_vl"), mixed_mm_data=True)
    assert not [unit.name for unit in units if "visual" in unit.name]
    assert [unit.name for unit in units if unit.may_idle] == [""]


def test_the_model_inside_an_actor_is_a_unit_so_that_it_can_run_by_itself() -> None:
    units = plan_units(Actor(tiny_model("qwen2")))
    assert [unit.name for unit in units] == [
        "model.model.layers.0",
        "model.model.layers.1",
        "model",
        "",
    ]
    assert [unit.name for unit in units if unit.stays] == ["model", ""]


def test_names_count_from_the_outermost_wrapper() -> None:
    model = Wrapper(tiny_model("qwen2"))
    for unit in plan_units(model):
        assert model.get_submodule(unit.name) is unit.module


def test_without_transformers_lists_of_like_modules_are_cut() -> None:
    assert names(Blocks()) == ["blocks.0", "blocks.1", "blocks.2", ""]


def test_a_block_that_shares_a_parameter_with_another_is_no_unit() -> None:
    model = Blocks()
    model.blocks[0][0].weight = model.last.weight  # type: ignore[index, union-attr]
    assert names(model) == ["blocks.1", "blocks.2", ""]


def test_a_block_that_routes_reduces_what_saw_no_data() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Experts(), Experts()])
    assert [(unit.name, unit.may_idle) for unit in plan_units(model)] == [
        ("layers.0", True),
        ("layers.1", True),
        ("", False),
    ]


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "qwen3_moe", "qwen2_vl"])
def test_every_parameter_belongs_to_a_unit_and_the_root_comes_last(kind: str) -> None:
    model = tiny_model(kind)
    units = plan_units(model)
    seen: set[int] = set()
    for unit in units:
        own = [parameter for parameter in unit.module.parameters() if id(parameter) not in seen]
        assert own or unit.module is model
        seen.update(map(id, own))
    assert seen == set(map(id, model.parameters()))
    assert units[-1].module is model


def test_planning_changes_nothing_of_the_models_class() -> None:
    model = tiny_model("qwen2")
    before = dict(vars(type(model)))
    plan_units(model)
    assert dict(vars(type(model))) == before


def test_a_plan_for_a_large_model_needs_no_memory() -> None:
    with torch.device("meta"):
        model = tiny_model_on_meta()
    assert len(plan_units(model)) == 80 + 1 + 1


def tiny_model_on_meta() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    )
