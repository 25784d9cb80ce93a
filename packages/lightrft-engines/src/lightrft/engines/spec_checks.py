"""Checks of a spec that engines have in common."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError


def require_model(engine: str, spec: EngineSpec) -> None:
    """:raises ValueError: it names neither a folder nor a configuration."""
    if spec.pretrain is None and spec.model_config is None:
        raise ValueError(f'engine "{engine}" needs a model: set --pretrain, or pass EngineSpec(model_config=...)')


def check_dtype(engine: str, spec: EngineSpec) -> None:
    """:raises NotBuiltError: engines with their own kernels support only three dtypes."""
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotBuiltError(f'engine "{engine}" computes in float32, bfloat16 or float16, not in {spec.dtype}')


def check_extra(engine: str, spec: EngineSpec, ours: Iterable[str]) -> None:
    """:param ours: options that the spec or the engine itself sets.

    :raises ValueError: ``spec.extra`` has one of them.
    """
    if said := sorted(set(spec.extra) & set(ours)):
        raise ValueError(
            f'engine "{engine}": {", ".join(said)} are set by the flags; leave them out of the extra options'
        )
