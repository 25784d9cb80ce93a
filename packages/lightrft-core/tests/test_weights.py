from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.strategy.errors import WeightSyncError
from lightrft.strategy.hub_layout import HubLayout
from lightrft.strategy.weights import (
    DEFAULT_BUCKET_BYTES,
    SAMPLES_PER_TENSOR,
    TensorSpec,
    UpdatePlan,
    merge_atoms,
    plan_buckets,
    sample_positions,
    sync_digest,
    take_samples,
)

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@st.composite
def manifests(draw: st.DrawFn) -> list[TensorSpec]:
    count = draw(st.integers(1, 20))
    return [
        TensorSpec(
            name=f"t{index}",
            shape=tuple(draw(st.lists(st.integers(1, 9), max_size=3))),
            dtype=draw(st.sampled_from(DTYPES)),
            atom=draw(st.sampled_from(["", "a", "b", "c", f"own{index}"])),
        )
        for index in range(count)
    ]


@st.composite
def fusions(draw: st.DrawFn, specs: list[TensorSpec]) -> list[list[str]]:
    names = [spec.name for spec in specs]
    return draw(st.lists(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True), max_size=4))


@given(st.data())
def test_what_shares_a_member_travels_together(data: st.DataObject) -> None:
    specs = data.draw(manifests())
    fused = data.draw(fusions(specs))
    groups = merge_atoms(specs, fused)
    flat = [spec.name for group in groups for spec in group]
    assert sorted(flat) == sorted(spec.name for spec in specs), "each tensor once"
    place = {spec.name: index for index, group in enumerate(groups) for spec in group}
    for group in fused:
        assert len({place[name] for name in group}) == 1
    for atom in {spec.atom for spec in specs if spec.atom}:
        assert len({place[spec.name] for spec in specs if spec.atom == atom}) == 1
    order = {spec.name: index for index, spec in enumerate(specs)}
    for group in groups:
        assert [order[spec.name] for spec in group] == sorted(order[spec.name] for spec in group)
    firsts = [order[group[0].name] for group in groups]
    assert firsts == sorted(firsts), "groups keep the order of their first member"


@given(st.data())
def test_nothing_travels_together_without_a_reason(data: st.DataObject) -> None:
    specs = data.draw(manifests())
    fused = data.draw(fusions(specs))
    for group in merge_atoms(specs, fused):
        names = {spec.name for spec in group}
        links = [set(f) & names for f in fused]
        links += [{s.name for s in group if s.atom == atom} for atom in {s.atom for s in group if s.atom}]
        reached = {group[0].name}
        for _ in names:
            for link in links:
                if link & reached:
                    reached |= link
        assert reached == names


@given(st.data(), st.integers(1, 5000))
def test_buckets_hold_whole_groups_and_only_a_single_group_exceeds_the_limit(data: st.DataObject, limit: int) -> None:
    specs = data.draw(manifests())
    fused = data.draw(fusions(specs))
    plan = UpdatePlan(version=1, specs=tuple(specs), fused=tuple(map(tuple, fused)), bucket_bytes=limit)
    buckets = plan_buckets(plan)
    groups = merge_atoms(specs, fused)
    assert [s for bucket in buckets for s in bucket] == [s for group in groups for s in group]
    starts = {group[0].name for group in groups}
    assert all(bucket[0].name in starts for bucket in buckets), "no group is cut"
    for bucket in buckets:
        size = sum(spec.nbytes for spec in bucket)
        assert size <= limit or sum(spec.name in starts for spec in bucket) == 1
    if sum(spec.nbytes for spec in specs) <= limit:
        assert len(buckets) == 1


def test_a_group_that_names_a_stranger_is_refused() -> None:
    with pytest.raises(WeightSyncError, match=r"fuses stranger, which the trainer does not export"):
        merge_atoms([TensorSpec(name="a", shape=(1,), dtype=torch.float32)], [["a", "stranger"]])


def test_a_bucket_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes = 0"):
        plan_buckets(UpdatePlan(version=1, bucket_bytes=0))


def test_a_cast_touches_floating_point_tensors_only() -> None:
    real = TensorSpec(name="a", shape=(2, 3), dtype=torch.float32)
    whole = TensorSpec(name="b", shape=(2, 3), dtype=torch.int64)
    assert real.cast(torch.bfloat16).nbytes == 12
    assert whole.cast(torch.bfloat16) is whole
    assert real.cast(None) is real


# ---- samples ---------------------------------------------------------------------------------------------------------
@given(st.integers(1, 10**12))
def test_sampled_positions_lie_inside_and_hold_both_ends(numel: int) -> None:
    positions = sample_positions(numel).tolist()
    assert len(positions) == min(numel, SAMPLES_PER_TENSOR)
    assert positions[0] == 0
    assert positions[-1] == numel - 1
    assert len(set(positions)) == len(positions)
    assert positions == sorted(positions)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans())
@settings(max_examples=50)
def test_samples_of_a_strided_view_are_its_elements(shape: list[int], turned: bool) -> None:
    whole = torch.arange(math.prod(shape) * 2.0).reshape(*shape, 2)
    view = whole[..., 0].movedim(0, -1) if turned else whole[..., 1]
    positions = sample_positions(view.numel())
    assert torch.equal(take_samples(view, positions), view.reshape(-1)[positions])


def test_a_digest_sees_names_shapes_dtypes_order_and_values() -> None:
    specs = [TensorSpec(name=name, shape=(4,), dtype=torch.float32) for name in "ab"]
    samples = {"a": torch.arange(4.0), "b": torch.ones(4)}
    base = sync_digest(specs, samples)
    assert sync_digest(specs, {name: value.clone() for name, value in samples.items()}) == base
    others = [
        sync_digest(specs[::-1], samples),
        sync_digest([TensorSpec(name="a", shape=(2, 2), dtype=torch.float32), specs[1]], samples),
        sync_digest([specs[0].cast(torch.bfloat16), specs[1]], samples),
        sync_digest(specs, {**samples, "b": torch.tensor([1.0, 1.0, 1.0, 1.0000001])}),
    ]
    assert len({base, *others}) == 5


# ---- scale -----------------------------------------------------------------------------------------------------------
def llama_70b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def qwen3_235b() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("make", "billions", "tensors", "expected_atom"),
    [
        (llama_70b, 70.55, 723, "model.embed_tokens.weight"),
        # 94 layers × (128 experts × 3 + 9) + 3
        (qwen3_235b, 235.09, 94 * (128 * 3 + 9) + 3, "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_plans_of_models_that_fit_no_machine_need_no_memory(
    make: Any, billions: float, tensors: int, expected_atom: str
) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make(), dtype=torch.bfloat16)
    layout = HubLayout(model)
    specs = layout.specs
    assert len(specs) == tensors
    assert sum(spec.numel for spec in specs) / 1e9 == pytest.approx(billions, rel=1e-3)
    fused = [
        tuple(f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv")
        for layer in range(model.config.num_hidden_layers)
    ]
    plan = UpdatePlan(version=1, specs=tuple(specs), fused=tuple(fused), bucket_bytes=DEFAULT_BUCKET_BYTES)
    buckets = plan_buckets(plan)
    groups = merge_atoms(specs, fused)
    largest = max(sum(spec.nbytes for spec in group) for group in groups)
    atom = max(groups, key=lambda group: sum(spec.nbytes for spec in group))[0].atom
    assert atom == expected_atom
    sizes = [sum(spec.nbytes for spec in bucket) for bucket in buckets]
    assert max(sizes) <= max(largest, DEFAULT_BUCKET_BYTES), "a rank's extra memory"
    assert sum(sizes) == sum(spec.nbytes for spec in specs)
    assert sum(size < DEFAULT_BUCKET_BYTES / 8 for size in sizes) <= len(buckets) / 4, "few buckets are nearly empty"
    place = {spec.name: index for index, bucket in enumerate(buckets) for spec in bucket}
    assert all(len({place[name] for name in group}) == 1 for group in fused)
