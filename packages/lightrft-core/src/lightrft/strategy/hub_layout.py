"""A model's parameters under the names and shapes that they have on the hub.

transformers 5 stores some models differently from their checkpoints: experts are stacked in 3-D, prefixes differ. Its
weight conversion can be reverted; we revert it once, on meta tensors, and record for each hub tensor *which view of
which module parameter* it is. After that export is a view and import is a copy into a view: no conversion runs again,
and one module parameter (an "atom") can be gathered, cast and sent without the rest of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .adapters import Adapter, find_adapters, plain_name
from .errors import HubLayoutError
from .weights import TensorSpec, UpdateKind

# peft's prefix of the adapted model's names.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class HubTensor:
    """``name`` on the hub is ``source`` in the module, seen through (shape, stride, offset) of the whole tensor."""

    name: str
    source: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """This hub tensor as a view of the whole, contiguous module tensor: writing to it writes there."""
        assert whole.is_contiguous(), f"{self.source}: hub views need the whole, contiguous tensor"
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(name=self.name, shape=self.shape, dtype=self.dtype, atom=self.source)


class HubLayout:
    """The hub's view of one module. ``by_source`` lists, for each module tensor, the hub tensors inside it.

    ``adapters`` has the LoRA adapters by the module tensor that they add to, whose hub tensors are views of the merged
    weight. The adapters' own tensors are here too, under peft's names, and are exported only on request.

    :param shapes: whole shape of each module tensor by name, for backends whose parameters show their shard's.
    :raises HubLayoutError: a hub tensor is not a view of one module tensor (some model families mix several), or an
        adapter cannot be merged.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, torch.Size] | None = None) -> None:
        sources = {name: _meta(tensor, (shapes or {}).get(name)) for name, tensor in hub_sources(model)}
        owner = {tensor.untyped_storage()._cdata: name for name, tensor in sources.items()}
        self.adapters = find_adapters(unwrap(model))
        self._factors = {name for adapter in self.adapters.values() for name in (adapter.a, adapter.b)}
        self.by_source: dict[str, list[HubTensor]] = {name: [] for name in sources}
        self.by_name: dict[str, HubTensor] = {}
        layers = {adapter.layer for adapter in self.adapters.values()}
        plain = {plain_name(name, layers): t for name, t in sources.items() if name not in self._factors}
        named = _revert_conversions(model, plain) | _peft_names(model, self.adapters.values(), sources)
        for hub_name, view in named.items():
            source = owner.get(view.untyped_storage()._cdata)
            if source is None or hub_name in self.by_name:
                raise HubLayoutError(
                    f"{type(unwrap(model)).__name__}: hub tensor {hub_name} is not a view of one module parameter; "
                    "this model family's conversion cannot be streamed"
                )
            tensor = HubTensor(
                name=hub_name,
                source=source,
                shape=tuple(view.shape),
                stride=tuple(view.stride()),
                offset=int(view.storage_offset()),
                dtype=view.dtype,
            )
            self.by_source[source].append(tensor)
            self.by_name[hub_name] = tensor

    @property
    def tensors(self) -> list[HubTensor]:
        """The model's hub tensors in module order, without adapters."""
        return [hub for source, hubs in self.by_source.items() if source not in self._factors for hub in hubs]

    @property
    def specs(self) -> list[TensorSpec]:
        """Export specs in module order."""
        return [tensor.spec for tensor in self.tensors]

    def specs_of(self, kind: UpdateKind) -> list[TensorSpec]:
        """Export specs of the "full" model, or only of its "adapter", in module order."""
        if kind == "full":
            return self.specs
        return [hub.spec for source, hubs in self.by_source.items() if source in self._factors for hub in hubs]


def unwrap(model: nn.Module) -> nn.Module:
    """Strip data-parallel and engine wrappers, which have the user's model as ``.module``."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def is_pretrained_model(module: nn.Module) -> bool:
    """Whether it is a transformers model, by its class, because core must not import transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def hub_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost transformers models inside ``model``, with their prefixes ("" or "model." and so on)."""
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, prefix: str) -> None:
        if is_pretrained_model(module):
            found.append((prefix, module))
            return
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(unwrap(model), "")
    return found


def inner_prefix(model: nn.Module) -> str:
    """Prefix of the one transformers model inside ``model``: "model." in an actor, "" if it is the module itself.

    Also "" if there is none, or several.
    """
    inner = hub_models(model)
    return inner[0][0] if len(inner) == 1 else ""


def hub_sources(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, each once (tied ones under their first name), then persistent buffers, with their module names."""
    model = unwrap(model)
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=True):
        seen.add(id(parameter))
        yield name, parameter
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers(remove_duplicate=True):
        if name in kept and id(buffer) not in seen:
            yield name, buffer


def _peft_names(
    model: nn.Module, adapters: Iterable[Adapter], sources: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapters' own tensors under the names that peft gives them in a file."""
    prefix = inner_prefix(model)  # the actor's level does not belong to the model
    return {
        f"{PEFT_PREFIX}{adapter.layer.removeprefix(prefix)}.{factor}.weight": sources[name]
        for adapter in adapters
        for factor, name in (("lora_A", adapter.a), ("lora_B", adapter.b))
    }


def _meta(tensor: torch.Tensor, shape: torch.Size | None) -> torch.Tensor:
    return torch.empty(tensor.shape if shape is None else shape, dtype=tensor.dtype, device="meta")


class _KeepViews(TorchFunctionMode):
    """Within it ``contiguous()`` does nothing, so that a reverted conversion stays a view of its source."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _revert_conversions(model: nn.Module, sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hub names to (views of) the given tensors."""
    inner = hub_models(model)
    if not inner:
        return dict(sources)
    from transformers.core_model_loading import revert_weight_conversion  # loaded already: the model is transformers'

    result: dict[str, torch.Tensor] = {}
    claimed: set[str] = set()
    for prefix, module in inner:
        mine = {name[len(prefix) :]: tensor for name, tensor in sources.items() if name.startswith(prefix)}
        claimed.update(prefix + name for name in mine)
        with _KeepViews():
            reverted = revert_weight_conversion(module, mine)  # pyright: ignore[reportArgumentType]
        # An actor that wraps one model uses that model's names; two models in one keep their prefixes.
        kept = prefix if len(inner) > 1 else ""
        result.update({kept + name: tensor for name, tensor in reverted.items()})
    result.update({name: tensor for name, tensor in sources.items() if name not in claimed})
    return result
