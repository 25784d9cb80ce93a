"""Write a model as a folder that ``from_pretrained`` loads, streaming bucket by bucket."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .disk import explain_write, settle, staging_for
from .errors import CheckpointError
from .hub_files import shard_names, write_shard_index
from .hub_layout import hub_models, unwrap
from .tensor_files import write_tensors
from .weights import DEFAULT_BUCKET_BYTES, TensorSpec, UpdatePlan, WeightBucket, plan_buckets

if TYPE_CHECKING:
    from .strategy_base import StrategyBase

# Weights that an older model may have left, in other files than the new one's.
MODEL_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def save_hub_model(
    strategy: StrategyBase,
    model: nn.Module,
    tokenizer: Any,
    output_dir: Path,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """See :meth:`StrategyBase.save_model`. The folder appears only when complete; other files of an existing one stay.

    :raises CheckpointError: rank 0 could not write it; raised on every rank.
    """
    specs = tuple(spec.cast(dtype) for spec in strategy.export_spec(model))
    plan = UpdatePlan(version=0, specs=specs, dtype=dtype, bucket_bytes=bucket_bytes)
    buckets = plan_buckets(plan)
    names = shard_names(len(buckets))
    output_dir = output_dir.resolve()
    staging = staging_for(output_dir)
    writer = strategy.is_rank_0()
    needed = sum(spec.nbytes for spec in specs)

    def write(work: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        # A rank that cannot write still takes part in gathering the rest: nobody is left waiting.
        if writer and not problems:
            try:
                with explain_write(staging, output_dir, needed):
                    work(*arguments, **keywords)
            except Exception as error:  # noqa: BLE001 - raised below, when every rank can learn of it
                problems.append(error)

    problems: list[Exception] = []
    try:
        with strategy.together("save_model", CheckpointError):
            write(_make_empty, staging)
            for bucket in strategy.export_weights(model, plan):
                write(_write_bucket, bucket, staging / names[bucket.index])
            write(_write_rest, model, tokenizer, staging, names, buckets)
            write(settle, staging, output_dir, stale=MODEL_FILES, last="config.json")
            if problems:
                raise problems[0]
    except Exception:
        if writer:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_bucket(bucket: WeightBucket, path: Path) -> None:
    write_tensors(path, bucket.tensors, metadata={"format": "pt"})


def _write_rest(
    model: nn.Module, tokenizer: Any, folder: Path, names: list[str], buckets: list[list[TensorSpec]]
) -> None:
    """The index of several files, the configuration and the tokenizer."""
    weight_map = {spec.name: name for name, specs in zip(names, buckets, strict=True) for spec in specs}
    write_shard_index(folder, weight_map, sum(spec.nbytes for specs in buckets for spec in specs))
    save_configuration(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_configuration(model: nn.Module, folder: Path) -> None:
    """The configuration and generation defaults of the transformers model inside, if there is one."""
    for _, inner in hub_models(unwrap(model))[:1]:
        config: Any = inner.config
        if getattr(config, "architectures", None) is None:
            config.architectures = [
                next(c.__name__ for c in type(inner).__mro__ if c.__module__.startswith("transformers."))
            ]
        config.save_pretrained(folder)
        if getattr(inner, "generation_config", None) is not None and getattr(inner, "can_generate", lambda: False)():
            inner.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
