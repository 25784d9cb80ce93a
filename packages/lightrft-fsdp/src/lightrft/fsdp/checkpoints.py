"""Weights and optimizer states written in PyTorch's Distributed Checkpoint format (DCP): every rank its rows.

What is written here is read by core (:mod:`lightrft.strategy.dcp_files`), for any backend.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.optim import Optimizer

from lightrft.strategy.dcp_files import plain_error
from lightrft.strategy.fragments import in_background
from lightrft.strategy.host_copies import HostCopies
from lightrft.strategy.hub_layout import hub_sources
from lightrft.strategy.sealed_file import SealedFile, Seals

from .shards import like, local
from .state import MASTER, STEP


def write(model: nn.Module, optimizer: Optimizer | None, folder: Path) -> Seals:
    """Write into ``folder`` from all ranks.

    :return: seals of the files that this rank wrote.
    :raises CheckpointError: a rank could not write.
    """
    rows, wholes = _rows(model, optimizer)
    return _save(_wrapped(rows, wholes), folder, None)


def write_copies(
    model: nn.Module, optimizer: Optimizer | None, folder: Path, copies: HostCopies, group: dist.ProcessGroup
) -> Future[Seals]:
    """The same in the background, from copies of the state.

    :param group: ranks that write, over gloo; nobody else may use it.
    """
    rows, wholes = _rows(model, optimizer)
    state = _wrapped(copies.take(rows), wholes)
    return in_background(lambda: _save(state, folder, group))


def _rows(
    model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """What this rank holds, by key, and which parameter each is cut like; None: it is whole."""
    rows: dict[str, torch.Tensor] = {}
    wholes: dict[str, torch.Tensor | None] = {}
    for name, tensor in hub_sources(model):
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        held = {"weight": state.get(MASTER, tensor), **state}
        for kind, value in held.items():
            if isinstance(value, torch.Tensor) and kind != MASTER:
                key = f"{kind}/{name}"
                rows[key], wholes[key] = local(value).detach(), None if kind == STEP else tensor
    return rows, wholes


def _wrapped(rows: dict[str, torch.Tensor], wholes: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {key: value if (whole := wholes[key]) is None else like(whole, value) for key, value in rows.items()}


def _save(state: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None) -> Seals:
    writer = dcp.FileSystemWriter(folder, sync_files=False)  # its files flush themselves
    writer.fs = files = _SealedFiles()
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise plain_error(folder, "written", error) from error
    return files.seals


class _SealedFiles(FileSystem):
    """Where DCP's writer writes: files are digested on their way, and flushed when they are closed."""

    def __init__(self) -> None:
        self.seals: Seals = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:
        assert mode == "wb"
        with SealedFile(Path(path)) as file:
            yield cast(Any, file)
        self.seals[Path(path)] = file.seal

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.seals[Path(new_path)] = self.seals.pop(Path(path))
