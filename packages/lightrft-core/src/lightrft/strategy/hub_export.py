"""Write a model as a folder that ``from_pretrained`` loads, streaming bucket by bucket."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from .hub_layout import hub_models, unwrap
from .weights import DEFAULT_BUCKET_BYTES, TensorSpec, UpdatePlan, plan_buckets

if TYPE_CHECKING:
    from .strategy_base import StrategyBase


def shard_names(buckets: list[list[TensorSpec]]) -> list[str]:
    """The hub's file names: one plain file, or numbered ones."""
    if len(buckets) == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{len(buckets):05d}.safetensors" for i in range(len(buckets))]


def save_hub_model(
    strategy: StrategyBase,
    model: nn.Module,
    tokenizer: Any,
    output_dir: Path,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """See :meth:`StrategyBase.save_model`. The folder appears whole or not at all."""
    specs = tuple(spec.cast(dtype) for spec in strategy.export_spec(model))
    plan = UpdatePlan(version=0, specs=specs, dtype=dtype, bucket_bytes=bucket_bytes)
    buckets = plan_buckets(plan)
    names = shard_names(buckets)
    output_dir = output_dir.resolve()
    staging = output_dir.with_name(f".{output_dir.name}.partial")
    writer = strategy.is_rank_0()
    if writer:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    with strategy.waits_for_ranks("save_model"):
        for bucket in strategy.export_weights(model, plan):
            if writer:
                tensors = {name: tensor.to("cpu").contiguous().clone() for name, tensor in bucket.tensors.items()}
                save_file(tensors, staging / names[bucket.index], metadata={"format": "pt"})
    if writer:
        if len(names) > 1:
            weight_map = {spec.name: name for name, specs in zip(names, buckets, strict=True) for spec in specs}
            index = {"metadata": {"total_size": sum(spec.nbytes for spec in plan.specs)}, "weight_map": weight_map}
            (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        _save_configuration(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _replace(staging, output_dir)
    strategy.barrier()


def _save_configuration(model: nn.Module, folder: Path) -> None:
    """The configuration and generation defaults of the transformers model inside, where there is one."""
    for _, inner in hub_models(unwrap(model))[:1]:
        config: Any = inner.config
        if getattr(config, "architectures", None) is None:
            config.architectures = [
                next(c.__name__ for c in type(inner).__mro__ if c.__module__.startswith("transformers."))
            ]
        config.save_pretrained(folder)
        if getattr(inner, "generation_config", None) is not None and getattr(inner, "can_generate", lambda: False)():
            inner.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]


def _replace(staging: Path, target: Path) -> None:
    """Put the new folder where the old one is; the old one goes last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
