"""A model's folder for an engine: read its configuration, write one for an engine without weights, check its
weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lightrft.strategy.errors import NotBuiltError
from lightrft.strategy.hub_files import pretrained_files
from lightrft.strategy.weights import sample_positions

from .manifest import Manifest


def read_configs(folder: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The transformers configuration of a folder or hub model, and its generation settings (or None)."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        return config, GenerationConfig.from_pretrained(folder)
    except OSError:
        return config, None


def save_config(config: Any, folder: str) -> None:
    """Write a model's configuration as a folder that an engine reads; the trainer's object is not changed."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    config = copy.deepcopy(config)
    if not config.architectures:
        classes = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
        config.architectures = [classes[config.model_type]]
    config.save_pretrained(folder)


class WeightReader(Protocol):
    """Gives access to an engine's weights, by hub name."""

    manifest: Manifest

    def local(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Those flat positions that are on this rank."""
        ...

    def sample(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Elements at flat positions, on the CPU."""
        ...


def check_loaded(engine: str, weights: WeightReader, folder: str) -> None:
    """Compare some elements of each of the engine's tensors with the files from which it read them.

    :param engine: its name, for the message. :param folder: or a hub name, whose files are in the local cache by now.
    :raises NotBuiltError: it stores a weight in another form than the file, so that a sync would corrupt it.
    """
    from safetensors import safe_open

    names: dict[Path, list[str]] = {}
    for name, file in pretrained_files(folder).items():
        names.setdefault(file, []).append(name)
    for file, held in names.items():
        with safe_open(file, framework="pt") as saved:
            wanted = {}
            for name in held:
                if name not in weights.manifest.shapes or (shape := weights.manifest.shapes[name]) == ():
                    continue
                if tuple(saved.get_slice(name).get_shape()) == tuple(shape):
                    wanted[name] = saved.get_slice(name)[:1].reshape(-1)
            mine = weights.local({name: sample_positions(first.numel()) for name, first in wanted.items()})
            for name, held in weights.sample(mine).items():
                if not torch.equal(held, wanted[name][mine[name]].to(held.dtype)):
                    raise NotBuiltError(
                        f'engine "{engine}" stores {name} on this device in another form than the checkpoint; weights '
                        "cannot be streamed into it: use --engine_type hf for this model"
                    )
