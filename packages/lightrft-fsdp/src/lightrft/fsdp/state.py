"""Training state by parameter name, to and from this rank's rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.plain_state import moments_of
from lightrft.strategy.state_source import WEIGHT, Fragment, TensorEntry, share_of
from lightrft.strategy.training_state import StateItem, receive_items

from .optimizer import ShardedAdamW
from .shards import cut_of, like, local, take_rows, whole

MASTER, STEP = "master", "step"


def iter_state(model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> Iterator[StateItem]:
    """See :meth:`StrategyBase.iter_state`. One parameter is gathered at a time; every rank must drain it.

    :param device: where the collectives work.
    """
    for name, tensor in hub_sources(model):
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        mine = sorted(rows_of(name, state, local(tensor)).items())
        moments = {kind: whole(tensor, rows, device).cpu() for kind, rows in mine}
        weight = whole(tensor, local(state.get(MASTER, tensor)), device).cpu()
        yield StateItem(name=name, weight=weight.detach(), moments=moments, step=int(state.get(STEP, 0)))


@torch.no_grad()
def load_state(model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
    """See :meth:`StrategyBase.load_state`. No communication: each rank reads everything and keeps its rows.

    :raises CheckpointError: names or shapes differ from the model's.
    """
    for item, tensor in receive_items(model, items):
        local(tensor).copy_(take_rows(tensor, item.weight))
        if optimizer is None:
            continue
        if not item.moments:
            optimizer.state.pop(tensor, None)
            continue
        state = state_for(optimizer, tensor, [*item.moments, *([STEP] if item.step else [])])
        if MASTER in state:
            state[MASTER].copy_(take_rows(tensor, item.weight))
        for kind, value in item.moments.items():
            if kind not in state:
                raise CheckpointError(f"{item.name}: the checkpoint has {kind}, which this optimizer does not use")
            local(state[kind]).copy_(take_rows(tensor, value))
        if STEP in state:
            state[STEP].fill_(float(item.step))


def state_for(optimizer: Optimizer, parameter: torch.Tensor, kinds: Iterable[str]) -> dict[str, torch.Tensor]:
    """A parameter's optimizer states, including ``kinds``; missing ones are created as zeros."""
    if isinstance(optimizer, ShardedAdamW):
        return optimizer.state_of(parameter)
    state = optimizer.state[parameter]
    for kind in kinds:
        if kind == STEP:
            state.setdefault(kind, torch.zeros((), dtype=torch.float32))
        elif kind not in state:
            state[kind] = like(parameter, torch.zeros_like(local(parameter).detach()))
    return state


def local_state(model: nn.Module, optimizer: Optimizer | None, rank: int, ranks: int) -> Iterator[Fragment]:
    """See :meth:`StrategyBase.local_state`. If the optimizer has fp32 masters, those are written."""
    for name, tensor in hub_sources(model):
        cut = cut_of(tensor)
        start = 0 if cut is None else cut.mine.start * cut.row_numel
        rows = local(tensor).detach()
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        share = share_of(rows.numel(), *_place_among_replicas(tensor, rank, ranks))
        if MASTER in state:
            yield Fragment(name=name, kind=WEIGHT, start=start, values=rows, owned=slice(0))
        yield Fragment(name=name, kind=WEIGHT, start=start, values=state.get(MASTER, rows), owned=share)
        for kind, values in rows_of(name, state, rows).items():
            yield Fragment(name=name, kind=kind, start=start, values=values, owned=share)


def rows_of(name: str, state: Mapping[str, Any], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """This rank's rows of a parameter's optimizer states, without the master weights."""
    mine = {kind: local(value) if isinstance(value, torch.Tensor) else value for kind, value in state.items()}
    return {kind: value for kind, value in moments_of(name, mine, rows.shape).items() if kind != MASTER}


def _place_among_replicas(tensor: torch.Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """(index, number) of this rank among those with the same rows."""
    if not isinstance(tensor, DTensor):
        return rank, ranks
    index, count = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            index = index * tensor.device_mesh.size(axis) + tensor.device_mesh.get_local_rank(axis)
            count *= tensor.device_mesh.size(axis)
    return index, count


def make_states(model: nn.Module, optimizer: Optimizer, entries: Mapping[str, TensorEntry]) -> None:
    """See :meth:`StrategyBase.make_states`.

    :raises CheckpointError: a state that this optimizer does not use.
    """
    for name, tensor in hub_sources(model):
        entry = entries[name]
        if not entry.moments:
            optimizer.state.pop(tensor, None)
            continue
        state = state_for(optimizer, tensor, [*entry.moments, *([STEP] if entry.step else [])])
        if strange := set(entry.moments) - set(state):
            lacking = ", ".join(sorted(strange))
            raise CheckpointError(f"{name}: the checkpoint has {lacking}, which this optimizer does not use")
        if STEP in state:
            state[STEP].fill_(float(entry.step))


@torch.no_grad()
def clear_adapters(model: nn.Module, layout: HubLayout) -> None:
    """Let every LoRA adapter add nothing. No communication."""
    tensors = dict(hub_sources(model))
    for adapter in layout.adapters.values():
        local(tensors[adapter.b]).zero_()


class Assembler:
    """Assembles whole hub tensors into module tensors, of which each rank keeps its rows.

    Only parameters whose hub tensors have partly arrived are held, on the host.
    """

    def __init__(self, model: nn.Module, layout: HubLayout) -> None:
        self._layout, self._tensors = layout, dict(hub_sources(model))
        self._open: dict[str, torch.Tensor] = {}
        self._left = {source: len(hubs) for source, hubs in layout.by_source.items()}

    def target(self, name: str) -> torch.Tensor:
        """Where to write the hub tensor ``name``. The one asked for before must have been written."""
        self.keep_rows()
        hub = self._layout.by_name[name]
        tensor = self._tensors[hub.source].detach()
        if cut_of(tensor) is None:
            return hub.view(local(tensor))
        self._left[hub.source] -= 1
        if hub.source not in self._open:
            self._open[hub.source] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return hub.view(self._open[hub.source])

    @torch.no_grad()
    def keep_rows(self) -> None:
        """Take this rank's rows of every parameter that is complete."""
        for source in [source for source in self._open if self._left[source] == 0]:
            local(self._tensors[source]).copy_(take_rows(self._tensors[source], self._open.pop(source)))
