"""Weights by hub name: export in buckets of any size, import, and a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.strategy.weights import UpdatePlan

from .claims import StrategyClaims, on_ranks, refused, weights_of

KINDS = ["qwen2", "qwen2_tied", "qwen3_moe", "qwen2_vl"]


class Actor(nn.Module):
    """A wrapper like a trainer's: the model is a child."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """Whatever the model returns."""
        return self.model(**inputs)


class WeightClaims(StrategyClaims):
    """export_spec, export_weights, import_weights, save_model."""

    @pytest.mark.parametrize("bucket_bytes", [1, 40_001, 2**40])
    @pytest.mark.parametrize("kind", KINDS)
    @on_ranks
    def test_export_equals_save_pretrained_in_buckets_of_any_size(self, kind: str, bucket_bytes: int) -> None:
        strategy = self.strategy()
        expected = _saved(self.model(kind), self.folder / str(strategy.rank))
        model = strategy.prepare(self.model(kind))
        exported, sizes = _export(strategy, model, bucket_bytes)
        assert sorted(exported) == sorted(expected)
        for name, tensor in expected.items():
            assert torch.equal(exported[name], tensor), name
        if bucket_bytes == 1:
            atoms = {spec.atom for spec in strategy.export_spec(model)}
            assert len(sizes) == len(atoms), "each atom travels alone"
        if bucket_bytes == 2**40:
            assert len(sizes) == 1
        specs = strategy.export_spec(model)
        largest = max(sum(s.nbytes for s in specs if s.atom == atom) for atom in {s.atom for s in specs})
        assert max(sizes) <= max(bucket_bytes, largest)

    @on_ranks
    def test_export_casts_floating_point_tensors(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        whole, _ = _export(strategy, model, 2**40)
        cast, sizes = _export(strategy, model, 2**40, torch.bfloat16)
        assert all(tensor.dtype == torch.bfloat16 for tensor in cast.values())
        assert all(torch.equal(cast[name], whole[name].to(torch.bfloat16)) for name in whole)
        assert sum(sizes) == sum(tensor.nbytes for tensor in cast.values())

    @on_ranks
    def test_tensors_of_about_one_element_a_rank_are_exported(self) -> None:
        strategy = self.strategy()
        model = nn.Sequential(nn.LayerNorm(1), nn.LayerNorm(2), nn.LayerNorm(3))
        expected = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        exported, _ = _export(strategy, strategy.prepare(model), 2**40)
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())

    @on_ranks
    def test_the_spec_announces_what_the_export_sends(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model("qwen3_moe"))
        exported, _ = _export(strategy, model, 2**20)
        specs = strategy.export_spec(model)
        assert [(s.name, s.shape, s.dtype) for s in specs] == [
            (name, tuple(tensor.shape), tensor.dtype) for name, tensor in exported.items()
        ]
        assert any("experts.3." in spec.name for spec in specs), "experts stand alone on the hub"

    @on_ranks
    def test_a_wrapping_actor_leaves_no_trace_in_the_names(self) -> None:
        strategy = self.strategy()
        plain = {spec.name for spec in strategy.export_spec(strategy.prepare(self.model()))}
        wrapped = {spec.name for spec in strategy.export_spec(strategy.prepare(Actor(self.model())))}
        assert wrapped == plain

    @on_ranks
    def test_export_follows_training(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        before, _ = _export(strategy, model, 2**40)
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer)
        after, _ = _export(strategy, model, 2**40)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        trained = weights_of(strategy, model)
        assert all(torch.equal(after[name], trained[name]) for name in after if name in trained)

    @pytest.mark.parametrize("kind", KINDS)
    @on_ranks
    def test_import_brings_another_models_weights(self, kind: str) -> None:
        strategy = self.strategy()
        source = self.model(kind, seed=5)
        hub = _saved(source, self.folder / str(strategy.rank))
        model = strategy.prepare(self.model(kind))
        strategy.import_weights(model, iter(hub.items()))
        exported, _ = _export(strategy, model, 2**40)
        assert all(torch.equal(exported[name], tensor) for name, tensor in hub.items())
        if kind != "qwen2_vl":
            rows = self.rows(2)
            with torch.no_grad():
                logits = model(input_ids=rows.to(strategy.device)).logits.cpu()
                torch.testing.assert_close(logits, source(input_ids=rows).logits, atol=1e-4, rtol=1e-4)

    @on_ranks
    def test_import_refuses_what_does_not_fit(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        hub = _export(strategy, model, 2**40)[0]
        name = "model.norm.weight"
        with refused(CheckpointError, saying=["stranger"]):
            strategy.import_weights(model, iter({**hub, "stranger": torch.zeros(1)}.items()))
        with refused(CheckpointError, saying=[name, "3"]):
            strategy.import_weights(model, iter({**hub, name: torch.zeros(3)}.items()))
        with refused(CheckpointError, saying=[name]):
            strategy.import_weights(model, iter((key, value) for key, value in hub.items() if key != name))

    @pytest.mark.parametrize("bucket_bytes", [50_000, 2**40])
    @pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe", "qwen2_vl"])
    @on_ranks
    def test_save_model_writes_a_folder_that_transformers_loads(self, kind: str, bucket_bytes: int) -> None:
        from lightrft.testing.tiny_models import VISION_KINDS, tiny_tokenizer

        strategy = self.strategy()
        model = strategy.prepare(Actor(self.model(kind)) if kind == "qwen3_moe" else self.model(kind))
        if kind != "qwen2_vl":
            self.train(strategy, model, strategy.create_optimizer(model))
        exported, _ = _export(strategy, model, 2**40)
        target = self.folder / "model"
        strategy.save_model(model, tiny_tokenizer(), target, bucket_bytes=bucket_bytes)
        strategy.barrier()
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        loader: Any = AutoModelForImageTextToText if kind in VISION_KINDS else AutoModelForCausalLM
        loaded, report = loader.from_pretrained(target, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        for again in (_read(target), _hub_tensors(loaded)):
            assert sorted(again) == sorted(exported)
            assert all(torch.equal(again[name], tensor) for name, tensor in exported.items())
        assert AutoTokenizer.from_pretrained(target).decode([40, 41]) == tiny_tokenizer().decode([40, 41])
        files = sorted(path.name for path in target.glob("*.safetensors"))
        if bucket_bytes < 2**40:
            index = json.loads((target / "model.safetensors.index.json").read_text())
            assert sorted(set(index["weight_map"].values())) == files
            assert len(files) > 1
        else:
            assert files == ["model.safetensors"]
        assert not list(self.folder.glob(".model*")), "nothing half-made is left beside it"

    @on_ranks
    def test_save_model_replaces_an_older_one_and_can_cast(self) -> None:
        strategy = self.strategy()
        first, second = strategy.prepare(self.model()), strategy.prepare(self.model(seed=2))
        target = self.folder / "model"
        strategy.save_model(first, None, target, bucket_bytes=20_000)
        strategy.save_model(second, None, target, dtype=torch.bfloat16)
        assert sorted(path.name for path in target.glob("*.safetensors*")) == ["model.safetensors"]
        saved = load_file(target / "model.safetensors")
        expected, _ = _export(strategy, second, 2**40, torch.bfloat16)
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
        strategy.barrier()


def _export(
    strategy: StrategyBase, model: nn.Module, bucket_bytes: int, dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """(tensors by hub name, bytes of each bucket)."""
    specs = tuple(spec.cast(dtype) for spec in strategy.export_spec(model))
    plan = UpdatePlan(version=1, specs=specs, dtype=dtype, bucket_bytes=bucket_bytes)
    tensors: dict[str, torch.Tensor] = {}
    sizes = []
    for index, bucket in enumerate(strategy.export_weights(model, plan)):
        assert bucket.index == index
        sizes.append(bucket.nbytes)
        tensors |= {name: tensor.detach().cpu().clone() for name, tensor in bucket.tensors.items()}
    return tensors, sizes


def _saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What transformers itself writes. Before set-up: afterwards only rank 0's transformers would write."""
    model.save_pretrained(folder)
    return _read(folder)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _hub_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    layout, tensors = HubLayout(model), dict(hub_sources(model))
    return {hub.name: hub.view(tensors[hub.source].detach()) for hub in layout.by_name.values()}
