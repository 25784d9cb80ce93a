"""LoRA: which layers of a model have an adapter, and the merged weight of a layer and its adapter.

An adapted layer computes ``W x + scaling * B (A x)``. On the hub the same layer is ``W + scaling * B A``, so every
export under hub names merges into a fresh tensor; in the model both stay apart. peft's layers are recognized by their
class name, because core must not import peft.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import HubLayoutError

BASE = "base_layer"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The low-rank addition to one module tensor.

    :param layer: the adapted layer's path. :param a: module name of A ``[rank, in]``. :param b: of B ``[out, rank]``.
    """

    layer: str
    a: str
    b: str
    scaling: float


def is_adapted(module: nn.Module) -> bool:
    """Whether it is one of peft's layers with a LoRA adapter."""
    return any(c.__name__ == "LoraLayer" and c.__module__.startswith("peft.") for c in type(module).__mro__)


def count_owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its ``id``: more than one where a weight is shared."""
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def find_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter in ``model``, by the module name of the weight that it adds to.

    :raises HubLayoutError: an adapter that is not of the form ``W + scaling * B A`` of a linear layer.
    """
    found: dict[str, Adapter] = {}
    owners = count_owners(model)
    for path, module in model.named_modules():
        if not is_adapted(module):
            continue
        layer: Any = module
        problem = _more_than_a_product(layer)
        if not problem and owners[id(layer.base_layer.weight)] > 1:  # each use of it would need its own sum
            problem = "an adapter on a weight that other layers share"
        if problem:
            raise HubLayoutError(
                f"{path or type(module).__name__}: {problem}, which cannot be merged into the layer's weight for the "
                "hub; use one plain LoRA adapter on linear layers"
            )
        (name,) = layer.lora_A
        prefix = f"{path}." if path else ""
        found[f"{prefix}{BASE}.weight"] = Adapter(
            layer=path,
            a=f"{prefix}lora_A.{name}.weight",
            b=f"{prefix}lora_B.{name}.weight",
            scaling=float(layer.scaling[name]),
        )
    return found


def _more_than_a_product(layer: Any) -> str | None:
    """Why one of peft's layers is not ``W + scaling * B A``; None if it is."""
    if not isinstance(layer.base_layer, nn.Linear) or getattr(layer, "fan_in_fan_out", False):
        return f"an adapter on a {type(layer.base_layer).__name__}"
    if len(layer.lora_A) != 1:
        return f"{len(layer.lora_A)} adapters ({', '.join(layer.lora_A)})"
    if layer.lora_variant:
        return f"a variant of LoRA ({', '.join(type(v).__name__ for v in layer.lora_variant.values())})"
    if any(layer.lora_bias.values()):
        return "an adapter with a bias"
    return "an adapter that is already merged" if layer.merged else None


def plain_name(name: str, layers: set[str]) -> str:
    """A module name without the ``base_layer`` that an adapter of one of ``layers`` has inserted."""
    layer, found, rest = name.rpartition(f"{BASE}.")
    return f"{layer}{rest}" if found and layer.removesuffix(".") in layers else name


def with_adapter(name: str, adapters: Mapping[str, Adapter], whole: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A module tensor as the hub has it: with its adapter added, where it has one.

    :param adapters: by the module tensor that they add to. :param whole: returns the whole module tensor of a name.
    """
    adapter = adapters.get(name)
    if adapter is None:
        return whole(name)
    return merge(whole(name), whole(adapter.a), whole(adapter.b), adapter.scaling)


@torch.no_grad()
def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """``weight + scaling * b @ a``, fresh, in fp32 at least.

    :param weight: ``[out, in]``, or some of its rows. :param b: ``[out, rank]``, or the same rows of it.
    """
    return _product(a, b, scaling, weight.dtype).add_(weight)


@torch.no_grad()
def merge_flat(flat: torch.Tensor, start: int, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """:func:`merge` of a flat range of the weight.

    :param start: where in the whole, flattened weight the range begins. :param b: whole, ``[out, rank]``.
    """
    width = a.shape[1]
    first, last = start // width, -(-(start + flat.numel()) // width)
    rows = _product(a, b[first:last], scaling, flat.dtype)
    return rows.view(-1)[start - first * width :][: flat.numel()].add_(flat)


def _product(a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    kind = torch.promote_types(dtype, torch.float32)
    return (b.to(kind) @ a.to(kind)).mul_(scaling)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it, ``model`` computes without its adapters: as the model that it was made from."""
    layers: list[Any] = [module for module in model.modules() if is_adapted(module)]
    before = [layer._disable_adapters for layer in layers]
    # Not peft's enable_adapters(): that one also changes requires_grad, which sharded models must not see.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
