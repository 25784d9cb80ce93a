"""The memory of tensors, freed and allocated again in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Storages:
    """The storages of some tensors, each once."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self._storages = [(storage, storage.nbytes()) for storage in found.values()]

    def empty(self) -> int:
        """Free the memory and drop the values; returns bytes."""
        freed = sum(storage.nbytes() for storage, _ in self._storages)
        for storage, _ in self._storages:
            storage.resize_(0)
        return freed

    def fill(self) -> None:
        """Allocate zeros: padding must be zero, and a cache must not have a NaN."""
        for storage, size in self._storages:
            if storage.nbytes() != size:
                storage.resize_(size)
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
