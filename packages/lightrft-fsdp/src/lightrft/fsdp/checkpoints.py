"""Weights and optimizer states written in PyTorch's Distributed Checkpoint format (DCP): every rank its rows.

What is written here is read by core (:mod:`lightrft.strategy.dcp_files`), for any backend.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from lightrft.strategy.dcp_files import plain_error
from lightrft.strategy.hub_layout import hub_sources

from .shards import like, local
from .state import MASTER, STEP


def write(
    model: nn.Module,
    optimizer: Optimizer | None,
    folder: Path,
    *,
    asynchronous: bool = False,
    group: dist.ProcessGroup | None = None,
) -> PendingWrite | None:
    """Write into ``folder`` from all ranks.

    :param asynchronous: copy the state, and write it in the background.
    :param group: ranks that write, over gloo; the background needs one that nobody else uses.
    :raises CheckpointError: a rank could not write.
    """
    state = _state(model, optimizer)
    writer = dcp.FileSystemWriter(folder, sync_files=False)  # whoever publishes the folder flushes it
    try:
        if asynchronous:
            response = dcp.async_save(state, storage_writer=writer, process_group=group)
            assert isinstance(response, Future)
            return PendingWrite(response, folder)
        dcp.save(state, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise plain_error(folder, "written", error) from error
    return None


class PendingWrite:
    """A write that goes on in the background; ``done`` and ``result`` are a future's."""

    def __init__(self, future: Future[Any], folder: Path) -> None:
        self._future, self._folder = future, folder

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> list[Path]:
        """Wait for the files; those that this rank wrote.

        :raises CheckpointError: a rank could not write.
        """
        try:
            self._future.result(timeout)
        except CheckpointException as error:
            raise plain_error(self._folder, "written", error) from error
        # FileSystemWriter's names; the first rank writes the metadata, which is small and left to whoever publishes.
        return sorted(self._folder.glob(f"__{dist.get_rank()}_*.distcp"))


def _state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, torch.Tensor]:
    """Everything to write, by key: this rank's rows, wrapped as what they are rows of."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in hub_sources(model):
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        tensors[f"weight/{name}"] = like(tensor, local(state.get(MASTER, tensor)).detach())
        for kind, value in state.items():
            if isinstance(value, torch.Tensor) and kind != MASTER:
                tensors[f"{kind}/{name}"] = value if kind == STEP else like(tensor, local(value))
    return tensors
