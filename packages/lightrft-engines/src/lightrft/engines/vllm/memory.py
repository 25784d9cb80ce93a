"""The memory of weights and KV cache: on a GPU by vLLM's sleep mode, on a CPU by freeing the storages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from ..storages import Storages


class EngineMemory(Protocol):
    """Memory that can be freed and allocated again."""

    def release_cache(self) -> int:
        """Free the KV cache; returns bytes."""
        ...

    def restore_cache(self) -> None:
        """Allocate it again, empty."""
        ...

    def release_weights(self, keep: bool) -> int:
        """Free the weights' memory on the device, with or without keeping their values on the host; returns bytes."""
        ...

    def restore_weights(self) -> None:
        """Allocate it again, with the values that were kept."""
        ...


class CPUMemory:
    """vLLM has no sleep mode on a CPU: the storages of its tensors are freed, and allocated again in place."""

    def __init__(self, model: torch.nn.Module, caches: Iterable[torch.Tensor]) -> None:
        self._caches = Storages(caches)
        self._weights = Storages(parameter.data for parameter in model.parameters())

    def release_cache(self) -> int:
        return self._caches.empty()

    def restore_cache(self) -> None:
        self._caches.fill()

    def release_weights(self, keep: bool) -> int:
        return 0 if keep else self._weights.empty()  # they are on the host already

    def restore_weights(self) -> None:
        self._weights.fill()


class DeviceMemory:
    """vLLM's sleep mode: one pool for weights and one for the KV cache, with constant addresses."""

    def __init__(self, worker: Any, device: torch.device) -> None:
        self._worker, self._device = worker, device

    def release_cache(self) -> int:
        before = self._free()
        self._worker.discard(("kv_cache",))
        return max(0, self._free() - before)

    def restore_cache(self) -> None:
        self._worker.wake_up(["kv_cache"])

    def release_weights(self, keep: bool) -> int:
        before = self._free()
        self._worker.sleep(1 if keep else 2)
        return max(0, self._free() - before)

    def restore_weights(self) -> None:
        self._worker.wake_up(["weights"])

    def _free(self) -> int:
        return torch.accelerator.get_memory_info(self._device)[0]


def zero_caches(caches: Iterable[torch.Tensor]) -> None:
    """Zero the cache: a NaN of the old weights would stay, since stale slots are masked by a product with 0."""
    for cache in caches:
        cache.zero_()
