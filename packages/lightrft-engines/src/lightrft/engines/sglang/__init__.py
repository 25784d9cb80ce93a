"""SGLang in processes of its own, beside the training process."""

from __future__ import annotations

from .engine import SGLangEngine

__all__ = ["SGLangEngine"]
