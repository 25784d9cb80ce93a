"""Prompts to train on: files, datasets, generated tasks. Names load on first use: some of them need torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .prompts import Prompt, PromptDataset, build_prompt_dataset, prompt_dataset_from_config
    from .records import DataError, Record
    from .rendering import PromptFormat
    from .sources import read_source

_HOMES = {
    "DataError": "records",
    "Prompt": "prompts",
    "PromptDataset": "prompts",
    "PromptFormat": "rendering",
    "Record": "records",
    "build_prompt_dataset": "prompts",
    "prompt_dataset_from_config": "prompts",
    "read_source": "sources",
}

__all__ = [
    "DataError",
    "Prompt",
    "PromptDataset",
    "PromptFormat",
    "Record",
    "build_prompt_dataset",
    "prompt_dataset_from_config",
    "read_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
