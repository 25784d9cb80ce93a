"""PyTorch FSDP2 as a LightRFT strategy."""

from __future__ import annotations

from .fsdpv2 import FSDPV2Strategy
from .meta_init import UnfilledModelError
from .optimizer import ShardedAdamW

__all__ = ["FSDPV2Strategy", "ShardedAdamW", "UnfilledModelError"]
