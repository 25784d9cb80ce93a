"""PyTorch FSDP2 as a LightRFT strategy."""

from __future__ import annotations

from lightrft.strategy.errors import UnfilledModelError

from .fsdpv2 import FSDPV2Strategy
from .optimizer import ShardedAdamW

__all__ = ["FSDPV2Strategy", "ShardedAdamW", "UnfilledModelError"]
