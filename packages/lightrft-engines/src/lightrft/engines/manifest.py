"""What a model expects of a weight update: its tensors by hub name, to compare with what a trainer announces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightrft.strategy.errors import WeightSyncError
from lightrft.strategy.hub_layout import HubLayout
from lightrft.strategy.weights import TensorSpec

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Hub names and shapes of one model.

    :param shapes: what must be sent. :param aliases: second names of tied weights, by which they may be sent too.
    """

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """:raises WeightSyncError: names or shapes differ; names all kinds of difference."""
        announced = {spec.name: spec.shape for spec in specs}
        taken = {**self.shapes, **{alias: self.shapes[name] for alias, name in self.aliases.items()}}
        missing = [name for name in self.shapes if name not in announced]
        unknown = [name for name in announced if name not in taken]
        shapes = [
            f"{name} (announced {announced[name]}, the engine's is {taken[name]})"
            for name in announced
            if name in taken and announced[name] != taken[name]
        ]
        problems = [
            f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
            for what, names in (("missing", missing), ("unknown to the engine", unknown), ("of another shape", shapes))
            if names
        ]
        if len(specs) > len(announced):
            problems.append(f"{len(specs) - len(announced)} announced twice")
        if problems:
            raise WeightSyncError("the weights do not fit the engine's model: " + "; ".join(problems))

    def check_known(self, names: Sequence[str]) -> None:
        """:raises WeightSyncError: the engine has no weights of such names."""
        if unknown := [name for name in names if self.aliases.get(name, name) not in self.shapes]:
            raise WeightSyncError(f"the engine has no weights named {', '.join(unknown[:_SHOWN])}")


def untied(name: str, owner: str) -> WeightSyncError:
    """The error for another value of ``name``, which is tied to ``owner`` in the engine."""
    return WeightSyncError(
        f"{name} is tied to {owner} in the engine's model, but another value was sent for it: "
        "give the engine a model with tie_word_embeddings=False, or tie the trainer's"
    )


def read_manifest(model: Any, layout: HubLayout, sources: Mapping[str, torch.Tensor]) -> Manifest:
    """The manifest of a transformers model (on any device, the meta device included).

    :param sources: its tensors by module name, each once (:func:`lightrft.strategy.hub_layout.hub_sources`).
    """
    names = {id(tensor): name for name, tensor in sources.items()}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = names[id(parameter)]
        inside = layout.by_source[source]
        if source != name and len(inside) == 1:
            aliases[name] = inside[0].name
    return Manifest(shapes={name: tensor.shape for name, tensor in layout.by_name.items()}, aliases=aliases)
