"""Whole weights from shards, bucket by bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.fsdp import FSDPV2Strategy, export
from lightrft.fsdp.export import ALIGNMENT, SMALL_BYTES, plan_collectives, plan_places
from lightrft.fsdp.shards import Cut
from lightrft.strategy import FakeStrategy
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import UpdatePlan, plan_buckets
from lightrft.testing import tiny_model, tiny_tokenizer

ONE_TENSOR, WHOLE = 1, 2**30
SETTINGS = {"seed": 1, "dist_timeout": 60.0, "micro_train_batch_size": 1, "train_batch_size": 2}


def whole_weights(strategy: Any, model: torch.nn.Module, **plan: Any) -> dict[str, torch.Tensor]:
    """Every exported tensor, copied before the next bucket overwrites it."""
    dtype = plan.pop("dtype", None)
    specs = tuple(spec.cast(dtype) for spec in strategy.export_spec(model))
    found: dict[str, torch.Tensor] = {}
    for bucket in strategy.export_weights(model, UpdatePlan(version=1, specs=specs, dtype=dtype, **plan)):
        for name, tensor in bucket.tensors.items():
            assert name not in found
            found[name] = tensor.clone()
    for spec in specs:
        assert found[spec.name].shape == spec.shape
        assert found[spec.name].dtype == spec.dtype
    return found


def exported_equals_the_plain_model(kind: str, bucket_bytes: int, half: bool, shard_size: int | None) -> None:
    plain, fake = tiny_model(kind), FakeStrategy()
    expected = whole_weights(fake, fake.prepare(plain))
    strategy = FSDPV2Strategy(**SETTINGS, engine_type="fake")
    model = strategy.prepare_model(tiny_model(kind), shard_size=shard_size)
    dtype = torch.bfloat16 if half else None
    found = whole_weights(strategy, model, bucket_bytes=bucket_bytes, dtype=dtype)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(dtype) if half else tensor), name


@pytest.mark.parametrize("bucket_bytes", [ONE_TENSOR, 50_001, WHOLE])
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
def test_buckets_of_any_size_hold_the_whole_model(ranks: Any, kind: str, bucket_bytes: int) -> None:
    ranks.run(exported_equals_the_plain_model, kind, bucket_bytes, False, None)


def test_weights_are_cast_before_they_travel(ranks: Any) -> None:
    ranks.run(exported_equals_the_plain_model, "qwen2", 50_001, True, None)


@pytest.mark.parametrize("shard_size", [1, 8])
def test_a_replicated_model_is_exported_within_its_shard_group(ranks: Any, shard_size: int) -> None:
    ranks.run(exported_equals_the_plain_model, "qwen2", 50_001, False, shard_size)


def test_a_vision_model_is_exported_under_its_hub_names(ranks: Any) -> None:
    ranks.run(exported_equals_the_plain_model, "qwen2_vl", 200_000, False, None)


def count_uneven() -> None:
    """13 tokens over two ranks: 7 rows and 6, and one-row tensors."""
    strategy = FSDPV2Strategy(**SETTINGS)
    model = torch.nn.Sequential(torch.nn.Embedding(13, 3), torch.nn.Linear(3, 1), torch.nn.Linear(1, 5))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model = strategy.prepare(model)
    for bucket_bytes in (ONE_TENSOR, WHOLE):
        found = whole_weights(strategy, model, bucket_bytes=bucket_bytes)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_rows_that_do_not_divide_come_out_right(ranks: Any) -> None:
    ranks.run(count_uneven)


def one_buffer_serves_every_bucket() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(tiny_model("llama"))
    specs = tuple(strategy.export_spec(model))
    plan = UpdatePlan(version=1, specs=specs, bucket_bytes=100_000)
    storages = set()
    count = 0
    for bucket in strategy.export_weights(model, plan):
        storages |= {tensor.untyped_storage().data_ptr() for tensor in bucket.tensors.values()}
        count += 1
    assert count > 2
    assert len(storages) == 1, "buckets share their memory"


def test_buckets_share_one_buffer(ranks: Any) -> None:
    ranks.run(one_buffer_serves_every_bucket)


def no_more_than_a_bucket_is_allocated() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(tiny_model("llama"))
    allocated: list[int] = []
    original = torch.empty

    def recorded(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = original(*shape, **options)
        if tensor.device.type != "meta":
            allocated.append(tensor.nbytes)
        return tensor

    specs = tuple(strategy.export_spec(model))
    largest = max(spec.nbytes for spec in specs)
    for bucket_bytes in (ONE_TENSOR, 60_000, 300_000):
        allocated.clear()
        export.torch.empty = recorded  # type: ignore[assignment]
        try:
            whole = sum(
                bucket.nbytes
                for bucket in strategy.export_weights(
                    model, UpdatePlan(version=1, specs=specs, bucket_bytes=bucket_bytes)
                )
            )
        finally:
            export.torch.empty = original
        assert whole == sum(spec.nbytes for spec in specs)
        assert len(allocated) == 1
        padding = len(specs) * ALIGNMENT
        assert allocated[0] <= max(bucket_bytes, largest) + padding


def test_extra_memory_is_the_larger_of_a_bucket_and_the_largest_tensor(ranks: Any) -> None:
    ranks.run(no_more_than_a_bucket_is_allocated)


def few_collectives() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(tiny_model("qwen2"))
    specs = tuple(strategy.export_spec(model))
    calls = []
    from lightrft.fsdp import shards

    original = shards.start_all_gather
    shards.start_all_gather = lambda *args: (calls.append(1), original(*args))[1]
    try:
        for _ in strategy.export_weights(model, UpdatePlan(version=1, specs=specs)):
            pass
    finally:
        shards.start_all_gather = original
    small = [tensor for _, tensor in hub_sources(model) if tensor.numel() * 4 < SMALL_BYTES]
    assert len(small) > 10
    assert len(calls) == 1


def test_small_tensors_share_a_collective(ranks: Any) -> None:
    ranks.run(few_collectives)


def export_after_a_forward_pass() -> None:
    """A forward pass with gradients and no backward leaves gathered parameters on the module."""
    strategy = FSDPV2Strategy(**SETTINGS, bf16=True)
    model = strategy.prepare(tiny_model("qwen2_tied"))
    expected = whole_weights(strategy, model)
    model(input_ids=torch.arange(5)[None])
    found = whole_weights(strategy, model)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_is_exported_is_the_shards_whatever_ran_before(ranks: Any) -> None:
    ranks.run(export_after_a_forward_pass)


def import_round_trip() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    for kind in ("qwen2_tied", "qwen3_moe"):
        source, target = strategy.prepare(tiny_model(kind)), strategy.prepare(tiny_model(kind, seed=5))
        sent = whole_weights(strategy, source)
        assert any(not torch.equal(value, sent[name]) for name, value in whole_weights(strategy, target).items())
        backwards = reversed(list(sent.items()))  # in any order
        strategy.import_weights(target, backwards)
        for name, value in whole_weights(strategy, target).items():
            assert torch.equal(value, sent[name]), name


def test_imported_weights_are_exported_again(ranks: Any) -> None:
    ranks.run(import_round_trip)


def save(folder: Path, kind: str) -> float:
    strategy = FSDPV2Strategy(**SETTINGS, bf16=True)
    model = strategy.prepare(tiny_model(kind))
    strategy.save_model(model, tiny_tokenizer(), folder, bucket_bytes=100_000)
    with torch.no_grad():
        return float(strategy.all_reduce(model(input_ids=torch.arange(9)[None]).logits.float().sum(), "max"))


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
def test_transformers_loads_a_saved_model(ranks: Any, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ranks.run(save, tmp_path / "model", kind)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(tiny_model(kind))
    for (name, value), (_, expected) in zip(
        loaded.named_parameters(), tiny_model(kind).named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("1 2 3")["input_ids"]


def test_places_follow_each_other_aligned_and_whole_tensors_take_none() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7))
    layout = HubLayout(model)
    cuts: dict[str, Cut | None] = {
        name: Cut(shape=tensor.shape, ranks=4, index=0) for name, tensor in hub_sources(model)
    }
    cuts["1.bias"] = None
    plan = plan_places(layout.specs, layout, cuts)
    assert [place.source for place in plan.places] == ["0.weight", "0.bias", "1.weight"]
    assert list(plan.whole) == ["1.bias"]
    end = 0
    for place in plan.places:
        assert place.offset % ALIGNMENT == 0
        assert place.offset >= end
        assert place.size == place.cut.padded_numel * 4
        end = place.offset + place.size
    assert plan.size == end


def large_model(kind: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.device("meta"):
        if kind == "dense 70B":
            return LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=8192,
                    intermediate_size=28672,
                    num_hidden_layers=80,
                    num_attention_heads=64,
                    num_key_value_heads=8,
                    vocab_size=128256,
                )
            )
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                hidden_size=4096,
                moe_intermediate_size=1536,
                num_hidden_layers=94,
                num_attention_heads=64,
                num_key_value_heads=4,
                head_dim=128,
                num_experts=128,
                num_experts_per_tok=8,
                vocab_size=151936,
                decoder_sparse_step=1,
            )
        )


@pytest.mark.parametrize("kind", ["dense 70B", pytest.param("mixture of experts 235B", marks=pytest.mark.full)])
def test_plans_for_large_models_need_no_tensors_and_stay_within_their_bounds(kind: str) -> None:
    model = large_model(kind)
    layout = HubLayout(model)
    cuts: dict[str, Cut | None] = {
        name: Cut(shape=tensor.shape, ranks=64, index=3) for name, tensor in hub_sources(model)
    }
    specs = tuple(spec.cast(torch.bfloat16) for spec in layout.specs)
    plan = UpdatePlan(version=1, specs=specs, dtype=torch.bfloat16)
    places = [plan_places(bucket, layout, cuts) for bucket in plan_buckets(plan)]
    exported = {place.source for bucket in places for place in bucket.places}
    assert exported == set(cuts)
    largest = max(place.size for bucket in places for place in bucket.places)
    for bucket in places:
        padding = len(bucket.places) * (ALIGNMENT + 64 * 8192 * 2)
        assert bucket.size <= max(plan.bucket_bytes, largest) + padding
        together = plan_collectives(bucket.places, room=2**22)
        assert sorted(p.source for group in together for p in group) == sorted(p.source for p in bucket.places)
        assert sum(p.size for group in together if len(group) > 1 for p in group) <= 2**22
