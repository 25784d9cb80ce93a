"""SGLang, in its own processes."""

from __future__ import annotations

from .engine import SGLangEngine

__all__ = ["SGLangEngine"]
