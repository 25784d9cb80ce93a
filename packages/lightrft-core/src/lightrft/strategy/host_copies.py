"""Copies of a model's training state on the host, for a save that goes on while training does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .device import synchronize


class HostCopies:
    """Copies whose memory serves the next save again: fresh pages take longer to get than to fill.

    Between saves it holds as much memory as the last one took; pinned where the state lies on an accelerator.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy ``tensors``; they may change as soon as this returns. What the call before returned is overwritten."""
        before, self._kept = self._kept, {}
        for name, tensor in tensors.items():
            copy = before.pop(name, None)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
            self._kept[name] = copy.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values()}:
            synchronize(device)
        return dict(self._kept)
