"""Whole tensors by hub name, bucket by bucket, from sharded parameters.

A bucket's parameters are gathered next to each other into one flat buffer, which all buckets reuse. Each rank casts its
rows into its own place there and the all-gather works in place, so a rank needs only the memory of one bucket. Small
parameters share a collective if the buffer has room to rearrange them. Each rank adds a LoRA adapter to its own rows
before the cast; of the two factors only A must be gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.strategy.adapters import Adapter, merge
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import TensorSpec, UpdatePlan, WeightBucket, plan_buckets

from .shards import Cut, Pack, cut_of, local, start_gather, wait

# Below this a collective costs more in latency than in bytes.
SMALL_BYTES = 2**18
# Largest packed collective, which must be rearranged afterwards.
STAGING_BYTES = 2**22
# Alignment of tensors, as in device allocators.
ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of one module tensor in the buffer.

    :param offset: in bytes. :param size: in bytes, every rank's padding included.
    """

    source: str
    dtype: torch.dtype
    cut: Cut
    offset: int
    size: int


@dataclass(kw_only=True)
class BucketPlan:
    """One bucket: hub names, what to gather for them into which place, and what is whole on each rank already."""

    names: list[str]
    places: list[Place] = field(default_factory=list)
    whole: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.places[-1].offset + self.places[-1].size if self.places else 0


def with_dtypes(layout: HubLayout, dtypes: Mapping[str, torch.dtype]) -> HubLayout:
    """Update a layout, in place, to the present dtypes of its module tensors."""
    for source, hubs in layout.by_source.items():
        layout.by_source[source] = [replace(hub, dtype=dtypes[source]) for hub in hubs]
        layout.by_name.update({hub.name: hub for hub in layout.by_source[source]})
    return layout


def plan_places(specs: Sequence[TensorSpec], layout: HubLayout, cuts: dict[str, Cut | None]) -> BucketPlan:
    """Give one bucket's module tensors places in a buffer. Pure.

    :param cuts: how each module tensor is sharded, by its module name; None for one that is whole on every rank.
    """
    plan = BucketPlan(names=[spec.name for spec in specs])
    end, seen = 0, set()
    for spec in specs:
        source = layout.by_name[spec.name].source
        if source in seen:
            continue
        seen.add(source)
        cut = cuts[source]
        if cut is None:
            plan.whole[source] = spec.dtype
            continue
        offset = aligned(end)
        end = offset + cut.padded_numel * spec.dtype.itemsize
        plan.places.append(Place(source=source, dtype=spec.dtype, cut=cut, offset=offset, size=end - offset))
    return plan


def export_buckets(
    model: nn.Module, layout: HubLayout, plan: UpdatePlan, device: torch.device
) -> Iterator[WeightBucket]:
    """See :meth:`StrategyBase.export_weights`. Every rank must drain it."""
    tensors = {name: tensor.detach() for name, tensor in hub_sources(model)}
    cuts = {name: cut_of(tensor) for name, tensor in tensors.items()}
    buckets = [plan_places(specs, layout, cuts) for specs in plan_buckets(plan)]
    longest = max((bucket.size for bucket in buckets), default=0)
    room = max(longest, plan.bucket_bytes)
    # As large as packing can use, but not larger than the plan allows.
    staging = min(room - longest, STAGING_BYTES, longest)
    buffer = torch.empty(longest + staging, dtype=torch.uint8, device=device)
    for index, bucket in enumerate(buckets):
        rows = _merged_rows(bucket, layout.adapters, tensors, cuts, device)
        wholes = {source: rows(source).to(device, kind) for source, kind in bucket.whole.items()}
        wholes |= _gather(bucket, rows, buffer)
        hubs = [layout.by_name[name] for name in bucket.names]
        yield WeightBucket(index, {hub.name: hub.view(wholes[hub.source]) for hub in hubs})


def _merged_rows(
    bucket: BucketPlan,
    adapters: Mapping[str, Adapter],
    tensors: Mapping[str, torch.Tensor],
    cuts: Mapping[str, Cut | None],
    device: torch.device,
) -> Callable[[str], torch.Tensor]:
    """A function that returns this rank's rows of a module tensor of the bucket, with its adapter added."""
    sources = [*(place.source for place in bucket.places), *bucket.whole]
    adapted = {source: adapters[source] for source in sources if source in adapters}
    factors = _whole({adapter.a: tensors[adapter.a] for adapter in adapted.values()}, cuts, device)

    def rows(source: str) -> torch.Tensor:
        mine, adapter = local(tensors[source]), adapted.get(source)
        if adapter is None:
            return mine
        # B is sharded like the weight: it has the same number of rows.
        a, b = factors[adapter.a], local(tensors[adapter.b])
        return merge(mine, a.to(mine.device), b.to(mine.device), adapter.scaling)

    return rows


def _whole(
    tensors: Mapping[str, torch.Tensor], cuts: Mapping[str, Cut | None], device: torch.device
) -> dict[str, torch.Tensor]:
    """Some small tensors, whole, in new memory."""
    plan, end = BucketPlan(names=[]), 0
    for name, tensor in tensors.items():
        if (cut := cuts[name]) is not None:
            size = cut.padded_numel * tensor.dtype.itemsize
            plan.places.append(Place(source=name, dtype=tensor.dtype, cut=cut, offset=end, size=size))
            end = aligned(end + size)
    gathered: dict[str, torch.Tensor] = {}
    if plan.places:
        buffer = torch.empty(2 * end + ALIGNMENT * len(plan.places), dtype=torch.uint8, device=device)
        gathered = _gather(plan, lambda name: local(tensors[name]), buffer)
    return {name: gathered[name] if name in gathered else local(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def _gather(
    bucket: BucketPlan, rows_of: Callable[[str], torch.Tensor], buffer: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Start all collectives of a bucket, wait for them, and return a view of each module tensor."""
    slots = {
        place.source: buffer[place.offset : place.offset + place.size].view(place.dtype) for place in bucket.places
    }
    free = aligned(bucket.size)
    work: list[Any] = []
    packs: list[tuple[Pack, list[Place]]] = []
    for tag, places in enumerate(plan_collectives(bucket.places, buffer.numel() - free)):
        rows = [rows_of(place.source) for place in places]
        if len(places) == 1:
            work += start_gather(slots[places[0].source], rows[0], places[0].cut, tag)
            continue
        size = sum(place.size for place in places)
        pack = Pack(buffer[free : free + size].view(places[0].dtype), [place.cut for place in places])
        free = aligned(free + size)
        packs.append((pack, places))
        work += pack.start(rows, tag)
    wait(work)
    for pack, places in packs:
        pack.sort([slots[place.source] for place in places])
    return {p.source: slots[p.source][: p.cut.shape.numel()].view(p.cut.shape) for p in bucket.places}


def plan_collectives(places: Sequence[Place], room: int) -> list[list[Place]]:
    """Which module tensors share a collective: small ones of one dtype and group, up to ``room`` bytes."""
    alone: list[list[Place]] = []
    packs: dict[tuple[torch.dtype, dist.ProcessGroup | None], list[Place]] = {}
    for place in places:
        key = (place.dtype, place.cut.group)
        need = place.size + (0 if key in packs else ALIGNMENT)
        if place.size >= SMALL_BYTES or need > room:
            alone.append([place])
            continue
        room -= need
        packs.setdefault(key, []).append(place)
    return [*packs.values(), *alone]


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
