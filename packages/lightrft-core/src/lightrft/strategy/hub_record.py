"""What a checkpoint stores about its model: enough to write a hub folder without building the model.

``layout.json`` in a model's folder says which view of which parameter each hub tensor is, and
which adapter is merged into it; ``hub/`` holds the configuration, generation defaults and tokenizer as
``save_pretrained`` writes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters import Adapter, with_adapter
from .errors import CheckpointError, HubLayoutError
from .hub_export import save_configuration
from .hub_layout import HubLayout, HubTensor, inner_prefix
from .state_source import StateSource, read_json

if TYPE_CHECKING:
    from .strategy_base import StrategyBase

LAYOUT, HUB = "layout.json", "hub"
# Files of a hub folder besides weights. Never code: a model that needs code names it in its configuration.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True, kw_only=True)
class HubRecord:
    """A model's hub tensors.

    :param prefix: of the one transformers model inside the module ("" for none or several).
    :param tensors: in module order.
    :param adapters: LoRA adapters by the module tensor that they add to.
    """

    prefix: str
    tensors: tuple[HubTensor, ...]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, layout: HubLayout) -> HubRecord:
        return cls(prefix=inner_prefix(model), tensors=tuple(layout.tensors), adapters=layout.adapters)

    def whole(self, source: StateSource, name: str) -> torch.Tensor:
        """A module tensor as the hub has it: with its adapter added, where it has one."""
        return with_adapter(name, self.adapters, source.whole)

    def write(self, folder: Path) -> None:
        rows = [
            [t.name, t.source, t.shape, t.stride, t.offset, str(t.dtype).removeprefix("torch.")] for t in self.tensors
        ]
        adapters = {name: asdict(adapter) for name, adapter in self.adapters.items()}
        (folder / LAYOUT).write_text(json.dumps({"prefix": self.prefix, "tensors": rows, "adapters": adapters}))

    @classmethod
    def read(cls, folder: Path) -> HubRecord | None:
        """The record in a model's folder; None if there is none.

        :raises CheckpointError: it is damaged.
        """
        if not (folder / LAYOUT).is_file():
            return None
        data = read_json(folder / LAYOUT)
        try:
            tensors = tuple(
                HubTensor(
                    name=name,
                    source=source,
                    shape=tuple(shape),
                    stride=tuple(stride),
                    offset=int(offset),
                    dtype=getattr(torch, dtype),
                )
                for name, source, shape, stride, offset, dtype in data["tensors"]
            )
            adapters = {name: Adapter(**given) for name, given in data.get("adapters", {}).items()}
            return cls(prefix=data["prefix"], tensors=tensors, adapters=adapters)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / LAYOUT}: not a layout of hub tensors: {error!r}") from error


def write_record(strategy: StrategyBase, model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write layout, configuration and tokenizer into a model's folder. No collective."""
    try:
        HubRecord.of(model, strategy.hub_layout(model)).write(folder)
    except HubLayoutError:
        return  # a model without a hub form: its checkpoints can move between backends, but not to the hub
    (folder / HUB).mkdir(exist_ok=True)
    save_configuration(model, folder / HUB)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / HUB)


def copy_companions(sources: Iterable[Path], folder: Path) -> None:
    """Copy configuration and tokenizer files; earlier sources take precedence."""
    for source in sources:
        for pattern in _COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if not path.name.endswith(".index.json") and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
