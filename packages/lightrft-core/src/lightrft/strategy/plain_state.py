"""Weights and training state of plain (unsharded) modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .checkpoint import import_by_name
from .errors import CheckpointError
from .hub_layout import HubLayout, hub_sources
from .state_source import WEIGHT, Fragment, TensorEntry, share_of
from .training_state import StateItem, receive_items
from .weights import TensorSpec

STEP = "step"


def moments_of(name: str, state: Mapping[str, Any], shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """A parameter's optimizer states, which have an element for each of its own, besides the step.

    :raises CheckpointError: there is another, which would be lost: of NAdam, for example, or of Adafactor.
    """
    moments = {kind: value for kind, value in state.items() if isinstance(value, torch.Tensor) and kind != STEP}
    for kind, value in moments.items():
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(
                f"{name}: the optimizer's {kind} is {list(value.shape)}, the parameter {list(shape)}: checkpoints hold "
                "only states of the parameter's shape; use an optimizer with such ones, as AdamW and SGD are"
            )
    return moments


@torch.no_grad()
def import_weights(
    model: nn.Module, layout: HubLayout, specs: Mapping[str, TensorSpec], source: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """See :meth:`StrategyBase.import_weights`.

    :param specs: the hub tensors that must come, by name.
    """
    tensors = dict(hub_sources(model))

    def target(name: str) -> torch.Tensor:
        hub = layout.by_name[name]
        return hub.view(tensors[hub.source].detach())

    import_by_name(specs, source, target)
    for adapter in layout.adapters.values():  # the imported weights include them
        tensors[adapter.b].zero_()


def iter_state(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
    """See :meth:`StrategyBase.iter_state`. Tensors are copies on the CPU."""
    for name, tensor in hub_sources(model):
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        moments = {kind: _copy(value) for kind, value in moments_of(name, state, tensor.shape).items()}
        yield StateItem(name=name, weight=_copy(tensor), moments=moments, step=int(state.get(STEP, 0)))


@torch.no_grad()
def load_state(model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
    """See :meth:`StrategyBase.load_state`.

    :raises CheckpointError: names or shapes differ from the model's.
    """
    for item, tensor in receive_items(model, items):
        tensor.copy_(item.weight)
        if optimizer is None:
            continue
        optimizer.state.pop(tensor, None)  # had not stepped when it was saved: drop the present state
        if item.moments:
            state: dict[str, Any] = {k: v.to(tensor.device, copy=True) for k, v in item.moments.items()}
            optimizer.state[tensor] = {STEP: step_count(optimizer, tensor, item.step), **state}


def local_state(model: nn.Module, optimizer: Optimizer | None, index: int = 0, replicas: int = 1) -> Iterator[Fragment]:
    """See :meth:`StrategyBase.local_state`; here every rank has everything.

    :param index: this rank's place among the ``replicas``, each of which writes its share.
    """
    for name, tensor in hub_sources(model):
        share = share_of(tensor.numel(), index, replicas)
        yield Fragment(name=name, kind=WEIGHT, start=0, values=tensor.detach(), owned=share)
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        for kind, value in moments_of(name, state, tensor.shape).items():
            yield Fragment(name=name, kind=kind, start=0, values=value, owned=share)


def state_entries(model: nn.Module, optimizer: Optimizer | None) -> dict[str, tuple[Sequence[int], int]]:
    """Whole shape and step of everything, by name."""
    states = optimizer.state if optimizer is not None else {}
    return {
        name: (tuple(tensor.shape), int(states.get(tensor, {}).get(STEP, 0))) for name, tensor in hub_sources(model)
    }


def make_states(model: nn.Module, optimizer: Optimizer, entries: Mapping[str, TensorEntry]) -> None:
    """Allocate, as zeros, the optimizer states that a checkpoint has for each parameter, and set its step."""
    for name, tensor in hub_sources(model):
        entry = entries[name]
        if not entry.moments:
            optimizer.state.pop(tensor, None)  # had not stepped when it was saved: drop the present state
            continue
        state = optimizer.state[tensor]
        for kind in entry.moments:
            if kind not in state:
                state[kind] = torch.zeros_like(tensor, dtype=entry.dtypes[kind])
        if STEP not in state:
            state[STEP] = step_count(optimizer, tensor)
        state[STEP].fill_(float(entry.step))


def step_count(optimizer: Optimizer, tensor: torch.Tensor, steps: int = 0) -> torch.Tensor:
    """0-d fp32, as torch's optimizers count; a fused kernel needs it on the device of ``tensor``."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.tensor(float(steps), dtype=torch.float32, device=tensor.device if fused else "cpu")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
