"""vLLM in the training process: every rank of a tensor-parallel group runs it with the same requests."""

from __future__ import annotations

from .engine import VLLMEngine

__all__ = ["VLLMEngine"]
