"""What travels in a weight sync: specs, plans, buckets, receipts.

A strategy says what it can export (:class:`TensorSpec`), the engine answers with an :class:`UpdatePlan` (which tensors
must travel together, in which dtype), and the strategy streams :class:`WeightBucket` after :class:`WeightBucket`. All
names and shapes are the hub's (see :mod:`lightrft.strategy.hub_layout`), so neither side knows the other's modules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeVar

import torch

from .errors import WeightSyncError

DEFAULT_BUCKET_BYTES = 512 * 2**20
SAMPLES_PER_TENSOR = 8
UpdateKind = Literal["full", "adapter"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor under its hub name. ``atom`` names the group that must be gathered together (one module parameter)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    atom: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> TensorSpec:
        """The spec after the plan's cast, which touches floating-point tensors only."""
        return self if dtype is None or not self.dtype.is_floating_point else replace(self, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """The engine's answer to ``begin_update``.

    :param version: the update's number; every output made with these weights carries it.
    :param kind: "full" or "adapter".
    :param specs: what will come, in the order of travel, already in the engine's dtype.
    :param fused: groups of names that the engine loads as one (qkv, gate-up, an expert set).
    :param dtype: cast to this before gathering; None keeps each tensor's own.
    :param bucket_bytes: no bucket is larger, unless a single atom is.
    """

    version: int
    kind: UpdateKind = "full"
    specs: tuple[TensorSpec, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    dtype: torch.dtype | None = None
    bucket_bytes: int = DEFAULT_BUCKET_BYTES


@dataclass(frozen=True)
class WeightBucket:
    """Some whole tensors by hub name. Valid only until the next bucket is asked for: its memory is used again."""

    index: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class SyncReceipt:
    """Proof of one sync.

    :param tensors_changed: tensors whose sampled elements differ from the last sync's; equal to ``tensors_received``
        on the first.
    :param verified: "full" (every element), "sampled" (:data:`SAMPLES_PER_TENSOR` elements a tensor), or "manifest"
        where the engine cannot read its weights back.
    :param digest: BLAKE2 of names, shapes, dtypes, and the sampled elements.
    :param seconds: wall time of the whole sync, verification included.
    """

    version: int
    kind: UpdateKind
    tensors_expected: int
    tensors_received: int
    tensors_changed: int
    nbytes: int
    buckets: int
    seconds: float
    verified: Literal["full", "sampled", "manifest"]
    digest: str

    def __str__(self) -> str:
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e9
        return (
            f"weights version {self.version}: {self.tensors_received}/{self.tensors_expected} tensors, "
            f"{self.tensors_changed} changed, {self.nbytes / 2**20:.1f} MiB in {self.buckets} buckets, "
            f"{self.seconds:.3f} s ({rate:.2f} GB/s), checked: {self.verified}, digest {self.digest}"
        )


def merge_atoms(specs: Sequence[TensorSpec], fused: Iterable[Sequence[str]]) -> list[list[TensorSpec]]:
    """Join the exporter's atoms and the engine's fused groups: what shares a member travels together.

    :return: groups in the order in which their first member stands in ``specs``; members keep that order too.
    :raises WeightSyncError: a fused group names a tensor that is not exported.
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    known = {spec.name for spec in specs}
    for spec in specs:
        if spec.atom:
            parent[find(f"tensor:{spec.name}")] = find(f"atom:{spec.atom}")
    for group in fused:
        missing = [name for name in group if name not in known]
        if missing:
            raise WeightSyncError(f"the engine fuses {', '.join(missing)}, which the trainer does not export")
        for name in group[1:]:
            parent[find(f"tensor:{name}")] = find(f"tensor:{group[0]}")
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(find(f"tensor:{spec.name}"), []).append(spec)
    return list(groups.values())


def plan_buckets(plan: UpdatePlan) -> list[list[TensorSpec]]:
    """Pack whole atoms into buckets of at most ``plan.bucket_bytes``; an atom above it travels alone.

    Pure: a plan for a 235B model is made from specs without a single tensor.
    """
    if plan.bucket_bytes < 1:
        raise ValueError(f"bucket_bytes = {plan.bucket_bytes}: must be at least 1")
    buckets: list[list[TensorSpec]] = []
    room = 0
    for atom in merge_atoms(plan.specs, plan.fused):
        size = sum(spec.nbytes for spec in atom)
        if buckets and size <= room:
            buckets[-1].extend(atom)
            room -= size
        else:
            buckets.append(list(atom))
            room = plan.bucket_bytes - size
    return buckets


@cache
def sample_positions(numel: int, count: int = SAMPLES_PER_TENSOR) -> torch.Tensor:
    """Flat positions (int64 ``[<= count]``) at which a sync is checked, spread evenly. Do not write to the result.

    The first and the last element are always among them: a truncated tensor shows at its end. They are the same in
    every sync, so that two syncs can be compared.
    """
    return torch.linspace(0, numel - 1, min(count, numel), dtype=torch.float64).long()


def take_samples(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Elements of ``tensor`` at flat ``positions``, on the CPU, without flattening it when it is a strided view."""
    return _elements(tensor.detach(), positions.to(tensor.device)).cpu()


def take_all_samples(
    tensors: Mapping[Key, torch.Tensor], positions: Mapping[Key, torch.Tensor]
) -> dict[Key, torch.Tensor]:
    """:func:`take_samples` of many tensors: what lies on a device comes over in one piece of each dtype."""
    together: dict[tuple[torch.device, torch.dtype], list[Key]] = {}
    found: dict[Key, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.device.type == "cpu":
            found[key] = _elements(tensor.detach(), positions[key])
        else:
            together.setdefault((tensor.device, tensor.dtype), []).append(key)
    for (device, _), keys in together.items():
        sizes = [positions[key].numel() for key in keys]
        there = torch.cat([positions[key] for key in keys]).to(device).split(sizes)
        pieces = [_elements(tensors[key].detach(), where) for key, where in zip(keys, there, strict=True)]
        found |= zip(keys, torch.cat(pieces).cpu().split(sizes), strict=True)
    return found


def _elements(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)[positions]
    return tensor[torch.unravel_index(positions, tensor.shape)]


def sync_digest(specs: Iterable[TensorSpec], samples: Mapping[str, torch.Tensor]) -> str:
    """A short fingerprint of what was sent: names, shapes, dtypes and sampled elements, in order."""
    hasher = hashlib.blake2b(digest_size=8)
    for spec in specs:
        hasher.update(f"{spec.name}{spec.shape}{spec.dtype}".encode())
        hasher.update(samples[spec.name].contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
