"""Copies of a model's training state in host memory, for a save during training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .device import synchronize


class HostCopies:
    """Copies whose memory is reused by the next save: allocating pages takes longer than filling them.

    Between saves it keeps the memory of the last one; pinned if the state is on an accelerator.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy ``tensors``; they may change as soon as this returns. It overwrites the copies of the previous call."""
        before, self._kept = self._kept, {}
        for name, tensor in tensors.items():
            copy = before.pop(name, None)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
            self._kept[name] = copy.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values()}:
            synchronize(device)
        return dict(self._kept)
