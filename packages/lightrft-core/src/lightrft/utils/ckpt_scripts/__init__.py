"""Checkpoint conversion: ``python -m lightrft.utils.ckpt_scripts.ds2hf IN OUT``, and five more over one function."""

from __future__ import annotations

from .command import add_convert_arguments, main, run_convert

__all__ = ["add_convert_arguments", "main", "run_convert"]
