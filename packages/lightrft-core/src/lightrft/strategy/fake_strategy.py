"""A strategy for one process: unit tests run against it, and its trajectory is the reference for every backend."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .engine import RolloutEngine
from .engine_host import EngineHost
from .meta_init import fill_whole
from .minimal_engine import MinimalEngine
from .native_strategy import NativeStrategy


class FakeStrategy(NativeStrategy):
    """Trains for real in one process, without ranks; constructs anywhere.

    Without ``args`` an optimizer step follows every backward pass, and nothing is clipped. A minimal engine
    replaces those that a unit test cannot have (vllm, sglang); any other ``engine_type`` is the real one.
    """

    name = "fake"
    implied: ClassVar[Mapping[str, Any]] = {"strategy": "fake"}
    distributed: ClassVar[bool] = False

    def __init__(
        self,
        seed: int | None = None,
        max_norm: float | None = None,
        micro_train_batch_size: int | None = None,
        train_batch_size: int | None = None,
        args: Any = None,
        **settings: Any,
    ) -> None:
        if args is None:
            max_norm = 0.0 if max_norm is None else max_norm
            train_batch_size = (micro_train_batch_size or 1) if train_batch_size is None else train_batch_size
        super().__init__(seed, max_norm, micro_train_batch_size, train_batch_size, args, **settings)
        self.engine_host = _StandInHost(self)

    def _place(self, model: nn.Module, shard_size: int) -> nn.Module:
        plan = fill_whole(model, self.device, self.config.seed)
        if self.config.dtype_name != "float32":
            # The forward pass computes in 16 bits; weights and gradients stay in fp32, as in the sharded backends.
            autocast = torch.autocast(self.device.type, getattr(torch, self.config.dtype_name))
            model.forward = functools.wraps(model.forward)(autocast(model.forward))
        self._read_pretrained(model, plan)
        return model


class _StandInHost(EngineHost):
    def engine_class(self, engine_type: str) -> type[RolloutEngine]:
        return MinimalEngine if engine_type in ("vllm", "sglang", "minimal") else super().engine_class(engine_type)


def get_fake_strategy(args: Any = None) -> FakeStrategy:
    """A FakeStrategy, by the name that older scripts use."""
    return FakeStrategy(args=args)
