"""The engine's side of a weight sync: its model's hub layout, copies into views, and the memory behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import TensorSpec, take_all_samples

from ..manifest import read_manifest, untied


class WeightStore:
    """The weights of one model, by hub name."""

    def __init__(self, model: Any) -> None:
        self._tensors = dict(hub_sources(model))
        self._layout = HubLayout(model)
        self._manifest = read_manifest(model, self._layout, self._tensors)
        self._aliases = self._manifest.aliases
        self._written: set[str] = set()

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Compare an announced manifest with the model. :raises WeightSyncError: they differ."""
        self._manifest.check(specs)
        self._written.clear()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors in. :raises WeightSyncError: two names of one tied weight came with different values."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                owner = self._aliases.get(name, name)
                view = self.view(owner)
                if owner in self._written:
                    if not torch.equal(view, tensor.to(view.device, view.dtype)):
                        raise untied(name, owner)
                    continue
                view.copy_(tensor)
                self._written.add(owner)

    def view(self, name: str) -> torch.Tensor:
        tensor = self._layout.by_name[name]
        return tensor.view(self._tensors[tensor.source].detach())

    def sample(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Elements at flat positions, on the CPU. :raises WeightSyncError: a name is unknown."""
        self._manifest.check_known(list(positions))
        return take_all_samples({name: self.view(self._aliases.get(name, name)) for name in positions}, positions)


class WeightMemory:
    """The storages of a model's weights, freed and allocated again without changing the tensors that use them."""

    def __init__(self, model: torch.nn.Module) -> None:
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for _, t in hub_sources(model)}
        self._storages = list(storages.values())
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._host: list[torch.UntypedStorage] | None = None

    def drop(self) -> int:
        """Free the memory and drop the values; returns the bytes."""
        self._host = None
        freed = sum(storage.nbytes() for storage in self._storages)
        for storage in self._storages:
            storage.resize_(0)
        return freed

    def to_host(self) -> int:
        """Copy the values to the host and free the device; on a CPU, which is the host, nothing is freed."""
        if all(storage.device.type == "cpu" for storage in self._storages):
            return 0
        host = [storage.cpu() for storage in self._storages]
        freed = self.drop()
        self._host = host
        return freed

    def back(self) -> None:
        """Allocate the memory again, with the values if they were kept."""
        for i, (storage, size) in enumerate(zip(self._storages, self._sizes, strict=True)):
            if storage.nbytes() == size:
                continue
            storage.resize_(size)
            if self._host is not None:
                storage.copy_(self._host[i])
        self._host = None
