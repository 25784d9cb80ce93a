"""Helpers that scripts use: command-line flags."""

from __future__ import annotations

from .arguments import add_arguments

__all__ = ["add_arguments"]
