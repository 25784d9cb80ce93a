"""The embedded engine: batched decoding over the transformers model itself, in this process."""

from __future__ import annotations

from .engine import HFEngine

__all__ = ["HFEngine"]
