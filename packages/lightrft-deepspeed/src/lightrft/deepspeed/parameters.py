"""Whole parameters, master weights and moments of a ZeRO model, whatever its stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.strategy.adapters import merge, merge_flat
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.plain_state import moments_of, step_count
from lightrft.strategy.state_source import WEIGHT, Fragment, TensorEntry, share_of
from lightrft.strategy.training_state import StateItem, receive_items
from lightrft.strategy.weights import TensorSpec, UpdatePlan, WeightBucket, plan_buckets

from .environment import load_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
# A and B of a LoRA adapter, whole, and its scaling.
Product = tuple[torch.Tensor, torch.Tensor, float]


def is_sharded(tensor: Any) -> bool:
    """Whether it is a ZeRO-3 parameter, of which each rank has a flat part."""
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Any) -> torch.Size:
    """The parameter's shape when it is whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


def gathered(tensor: torch.Tensor, *, written: bool = False) -> AbstractContextManager[Any]:
    """Within it the parameter is whole; ``written``: rank 0's value is kept. Collective with ZeRO-3."""
    return load_deepspeed().zero.GatheredParameters(
        [tensor], modifier_rank=0 if written else None, enabled=is_sharded(tensor)
    )


# ---- weights ---------------------------------------------------------------------------------------------------------
def export_buckets(model: nn.Module, layout: HubLayout, plan: UpdatePlan) -> Iterator[WeightBucket]:
    """Stream whole tensors; under ZeRO-3 only one bucket's parameters are gathered at a time, cast before.

    LoRA adapters are added before the cast, under ZeRO-3 by each rank to its own shard.
    """
    tensors = dict(hub_sources(model))
    for index, specs in enumerate(plan_buckets(plan)):
        yield WeightBucket(index, _bucket(specs, layout, tensors, plan.dtype))


def _bucket(
    specs: Sequence[TensorSpec], layout: HubLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    sources = list(dict.fromkeys(layout.by_name[spec.name].source for spec in specs))
    adapters = {source: layout.adapters[source] for source in sources if source in layout.adapters}
    factors = _gather({name: tensors[name] for adapter in adapters.values() for name in (adapter.a, adapter.b)}, None)
    products = {s: (factors[adapter.a], factors[adapter.b], adapter.scaling) for s, adapter in adapters.items()}
    whole = _gather({source: tensors[source] for source in sources}, dtype, products)
    bucket = {}
    for spec in specs:
        hub = layout.by_name[spec.name]
        bucket[spec.name] = hub.view(whole[hub.source]).to(spec.dtype)
    return bucket


def _gather(
    tensors: Mapping[str, Any], dtype: torch.dtype | None, products: Mapping[str, Product] = MappingProxyType({})
) -> dict[str, torch.Tensor]:
    """Whole tensors by name. One collective for all shards of the same group and dtype.

    :param products: the adapters' products to add to some of them.
    """
    whole = {name: tensor.detach() for name, tensor in tensors.items() if not is_sharded(tensor)}
    whole |= {name: merge(whole[name], *product) for name, product in products.items() if name in whole}
    batches: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            kind = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
            batches.setdefault((tensor.ds_process_group, kind), []).append(name)
    for (group, kind), names in batches.items():
        whole |= _gather_shards({name: tensors[name] for name in names}, group, kind, products)
    return whole


def _gather_shards(
    tensors: Mapping[str, Any], group: Any, dtype: torch.dtype, products: Mapping[str, Product]
) -> dict[str, torch.Tensor]:
    shards = [_shard_with(tensor, products.get(name)).to(tensor.device, dtype) for name, tensor in tensors.items()]
    mine, ranks = torch.cat(shards), dist.get_world_size(group)
    everyone = mine.new_empty(ranks, mine.numel())
    dist.all_gather_into_tensor(everyone.view(-1), mine, group=group)
    result, start = {}, 0
    for (name, tensor), shard in zip(tensors.items(), shards, strict=True):
        parts = everyone[:, start : start + shard.numel()].contiguous()  # parts of one element would stay apart
        result[name] = parts.view(-1)[: tensor.ds_numel].view(tensor.ds_shape)  # the last part is padded
        start += shard.numel()
    return result


def _shard_with(tensor: Any, product: Product | None) -> torch.Tensor:
    """This rank's flat shard of a parameter, padding included, with its part of ``product`` added."""
    padded = tensor.ds_tensor.detach().reshape(-1)
    if product is None:
        return padded
    start, mine = _shard(tensor, padded)
    a, b, scaling = product
    merged = merge_flat(mine, start, a.to(mine.device), b.to(mine.device), scaling)
    return torch.cat([merged, merged.new_zeros(padded.numel() - merged.numel())])


def clear_adapters(model: nn.Module, zero: Any, layout: HubLayout) -> None:
    """Let every LoRA adapter add nothing. Collective with ZeRO-3."""
    tensors = dict(hub_sources(model))
    for adapter in layout.adapters.values():
        tensor = tensors[adapter.b]
        set_weight(tensor, torch.zeros(whole_shape(tensor), dtype=tensor.dtype), zero)


def set_weight(tensor: torch.Tensor, value: torch.Tensor, zero: Any) -> None:
    """Set a whole parameter and its master weights from ``value``, the same on every rank. Collective under ZeRO-3.

    :param zero: the engine's ZeRO optimizer, or None for a model that does not train.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    with gathered(tensor, written=True):
        tensor.data.copy_(value)
    if zero is not None and tensor.requires_grad:
        safe_set_full_fp32_param(tensor, value.float())


class Assembler:
    """Assembles whole hub tensors into parameters, each of which is set as soon as it is complete.

    Only parameters whose hub tensors have partly arrived are held, on the host.

    :param specs: the hub tensors that will come.
    """

    def __init__(self, model: nn.Module, zero: Any, layout: HubLayout, specs: Iterable[str]) -> None:
        self._layout, self._tensors, self._zero = layout, dict(hub_sources(model)), zero
        self._open: dict[str, torch.Tensor] = {}
        self._left = Counter(layout.by_name[name].source for name in specs)

    def target(self, name: str) -> torch.Tensor:
        """Where to write the hub tensor ``name``. The one asked for before must have been written."""
        self.set_complete()
        hub = self._layout.by_name[name]
        self._left[hub.source] -= 1
        if hub.source not in self._open:
            tensor = self._tensors[hub.source]
            self._open[hub.source] = torch.empty(whole_shape(tensor), dtype=tensor.dtype)
        return hub.view(self._open[hub.source])

    def set_complete(self) -> None:
        """Set every parameter that is complete. Collective under ZeRO-3."""
        for source in [source for source in self._open if self._left[source] == 0]:
            set_weight(self._tensors[source], self._open.pop(source), self._zero)


# ---- optimizer state -------------------------------------------------------------------------------------------------
def iter_state(model: nn.Module, zero: Any) -> Iterator[StateItem]:
    """Master weight, moments and step of each parameter, whole, on every rank. Collective.

    :param zero: the engine's ZeRO optimizer, or None for a frozen model.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    step = adam_step(zero)
    kinds = kinds_of_state(zero)
    link_states(zero)
    for name, tensor in hub_sources(model):
        if zero is None or not tensor.requires_grad:
            yield StateItem(name=name, weight=_gather({name: tensor}, None)[name].to("cpu", copy=True))
            continue
        moments = {key: safe_get_full_optimizer_state(tensor, key) for key in kinds}
        yield StateItem(
            name=name,
            weight=_on_host(safe_get_full_fp32_param(tensor)),
            moments={key: _on_host(moment) for key, moment in moments.items()},
            step=step,
        )


def _on_host(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a trained parameter has master weights and moments"
    return tensor.to("cpu", copy=True)


@torch.no_grad()
def load_state(model: nn.Module, zero: Any, items: Iterable[StateItem], *, with_optimizer: bool) -> None:
    """Load a stream of state, the same on every rank. Collective under ZeRO-3.

    :param with_optimizer: load the moments too, else only the (master) weights.
    :raises CheckpointError: names or shapes differ from the model's.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    for item, tensor in receive_items(model, items, whole_shape):
        set_weight(tensor, item.weight, zero)
        if zero is None or not tensor.requires_grad:
            continue
        if with_optimizer and not item.moments:
            zero.optimizer.state.clear()  # saved before the first step
        if with_optimizer and item.moments:
            _make_states(zero, item.step, item.moments)
            for key, moment in item.moments.items():
                safe_set_full_optimizer_state(tensor, moment.float(), key)


def adam_step(zero: Any) -> int:
    """Optimizer steps so far, the same for every parameter."""
    states = list(zero.optimizer.state.values()) if zero is not None else []
    return int(states[0]["step"]) if states and "step" in states[0] else 0


def flat_partitions(zero: Any) -> list[torch.Tensor]:
    """This rank's master weights, flat: the tensors that the inner optimizer steps on."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise AssertionError(f"{type(zero).__name__}: no flat partition found")


def kinds_of_state(zero: Any) -> list[str]:
    """Names of the inner optimizer's states, the same on every rank; none before its first step.

    :raises CheckpointError: there is one that no checkpoint can hold.
    """
    if zero is None:
        return []
    states = [(zero.optimizer.state.get(flat, {}), flat.shape) for flat in flat_partitions(zero)]
    return sorted({kind for state, shape in states for kind in moments_of("this rank's weights", state, shape)})


def _make_states(zero: Any, step: int, kinds: Iterable[str]) -> None:
    """Create the inner optimizer's states, as its first step would, so that values can be set."""
    inner = zero.optimizer
    for flat in flat_partitions(zero):
        state = inner.state[flat]
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(flat)
        if step:  # DeepSpeed's own optimizers count in a plain number, SGD does not count
            own = type(inner).__module__.startswith("deepspeed.")
            state["step"] = step if own else step_count(inner, flat, step)
    link_states(zero)


def link_states(zero: Any) -> None:
    """Link each parameter to its moments in the flat partitions.

    DeepSpeed does this for stages 1 and 2 during the first step, but right after the first parameter group: the other
    groups have no state then and are never linked.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


# ---- this rank's part, as flat ranges --------------------------------------------------------------------------------
def local_state(model: nn.Module, zero: Any, rank: int, ranks: int, *, with_optimizer: bool) -> Iterator[Fragment]:
    """See :meth:`StrategyBase.local_state`. No communication.

    A trained parameter is saved from the fp32 partition; its 16-bit copy is only loaded.

    :param zero: the engine's ZeRO optimizer, or None for a frozen model.
    """
    link_states(zero)
    if with_optimizer:
        kinds_of_state(zero)
    for name, tensor in hub_sources(model):
        trained = zero is not None and tensor.requires_grad
        for start, values, replicas, index in _computed_with(tensor, rank, ranks):
            owned = slice(0) if trained or replicas == 0 else share_of(values.numel(), index, replicas)
            yield Fragment(name=name, kind=WEIGHT, start=start, values=values, owned=owned)
        if trained:
            for kind, start, values in _stepped_on(zero, tensor, with_optimizer):
                yield Fragment(name=name, kind=kind, start=start, values=values)


def _computed_with(tensor: Any, rank: int, ranks: int) -> Iterator[tuple[int, torch.Tensor, int, int]]:
    """What the forward pass uses on this rank: (start, values, number of ranks with the same, this one's index)."""
    if not is_sharded(tensor):
        yield 0, tensor.detach(), ranks, rank
        return
    members = dist.get_world_size(tensor.ds_process_group)
    start, values = _shard(tensor, tensor.ds_tensor)
    yield start, values, ranks // members, rank // members
    if tensor.shape == tensor.ds_shape:  # small ones stay gathered between steps
        yield 0, tensor.detach(), 0, 0


def _shard(tensor: Any, padded: torch.Tensor) -> tuple[int, torch.Tensor]:
    """A ZeRO-3 parameter's flat part without its padding: its start in the whole, and its elements."""
    flat = padded.detach().view(-1)
    start = dist.get_rank(tensor.ds_process_group) * tensor.ds_tensor.ds_numel
    return min(start, tensor.ds_numel), flat[: max(0, min(flat.numel(), tensor.ds_numel - start))]


def _stepped_on(zero: Any, tensor: Any, with_optimizer: bool) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The optimizer's states of a parameter on this rank: (kind, start, values)."""
    if is_sharded(tensor):
        group, offset, numel = zero.grad_position[zero.get_param_id(tensor)]
        flat = zero.fp32_partitioned_groups_flat[group]
        states = {WEIGHT: flat, **(_moments(zero.optimizer, flat) if with_optimizer else {})}
        for kind, values in states.items():
            yield kind, *_shard(tensor, values.narrow(0, offset, numel))
        return
    mapping = tensor._hp_mapping
    if mapping is None:  # it is in other ranks' partitions
        return
    start = mapping.lp_fragment_address.start
    yield WEIGHT, start, mapping.hp_fragment.detach()
    if with_optimizer:
        for kind, values in (mapping.optim_fragment or {}).items():
            yield kind, start, values.detach()


def _moments(optimizer: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    state = optimizer.state.get(flat, {})
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == flat.shape}


def state_entries(model: nn.Module, zero: Any) -> dict[str, tuple[Sequence[int], int]]:
    """See :meth:`StrategyBase.state_entries`."""
    step = adam_step(zero)
    return {
        name: (tuple(whole_shape(tensor)), step if tensor.requires_grad else 0) for name, tensor in hub_sources(model)
    }


def make_states(model: nn.Module, zero: Any, entries: Mapping[str, TensorEntry]) -> None:
    """See :meth:`StrategyBase.make_states`. A ZeRO optimizer has one step count for all parameters.

    :raises CheckpointError: a state that this optimizer does not use.
    """
    trained = {name: entries[name] for name, tensor in hub_sources(model) if tensor.requires_grad}
    known = _adams_kinds(zero.optimizer)
    for name, entry in trained.items():
        if known and (strange := set(entry.moments) - known):
            lacking = ", ".join(sorted(strange))
            raise CheckpointError(f"{name}: the checkpoint has {lacking}, which this optimizer does not use")
    if any(entry.moments for entry in trained.values()):
        kinds = sorted({kind for entry in trained.values() for kind in entry.moments})
        _make_states(zero, max(entry.step for entry in trained.values()), kinds)
    else:
        zero.optimizer.state.clear()  # saved before the first step


def _adams_kinds(optimizer: Any) -> set[str]:
    """Names of the states of torch's or DeepSpeed's Adam; none for another optimizer, which may have any."""
    if not isinstance(optimizer, torch.optim.Adam) and not type(optimizer).__module__.startswith("deepspeed.ops.adam"):
        return set()
    return {*MOMENTS, *("max_exp_avg_sq" for group in optimizer.param_groups if group.get("amsgrad"))}


def renew_secondary_shards(model: nn.Module) -> None:
    """Update the secondary shards (``--zpg``) after the primary ones were written directly. Collective."""
    for _, tensor in hub_sources(model):
        if is_sharded(tensor) and getattr(tensor, "ds_secondary_tensor", None) is not None:
            with gathered(tensor, written=True):
                pass
