"""Weights and optimizer states in PyTorch's Distributed Checkpoint format (DCP).

Every rank writes its rows, and reads its rows at any number of ranks. Keys are ``weight/NAME``, ``exp_avg/NAME``,
``exp_avg_sq/NAME`` and ``step/NAME``. DCP pickles its metadata: it is read here by an unpickler that knows nothing but
DCP's own records, and tensors are read weights-only.
"""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.optim import Optimizer

from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_layout import hub_sources

from .shards import like, local
from .state import MASTER, STEP, state_for

METADATA = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
_PATHS = {"PosixPath": PurePosixPath, "PurePosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}


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
        raise _plain(folder, "written", error) from error
    return None


def read(
    model: nn.Module, optimizer: Optimizer | None, folder: Path, *, group: dist.ProcessGroup | None = None
) -> None:
    """Read this rank's rows of what any number of ranks wrote.

    :param optimizer: None leaves its states in the files.
    :raises CheckpointError: a file is missing, damaged or not a checkpoint's; names or shapes are another model's.
    """
    reader = SafeReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    by_name: dict[str, set[str]] = {}
    for key in saved:
        kind, _, name = key.partition("/")
        by_name.setdefault(name, set()).add(kind)
    targets: dict[str, torch.Tensor] = {}
    filled: list[torch.Tensor] = []
    for name, tensor in hub_sources(model):
        found = saved.get(f"weight/{name}")
        if not isinstance(found, TensorStorageMetadata) or found.size != tensor.shape:
            have = "absent" if found is None else tuple(getattr(found, "size", ()))
            raise CheckpointError(f"{folder}: {name} is {have} there, {tuple(tensor.shape)} here")
        targets[f"weight/{name}"] = like(tensor, local(tensor).detach())
        if optimizer is None:
            continue
        kinds = by_name.get(name, set()) - {"weight"}
        if not kinds:
            optimizer.state.pop(tensor, None)
            continue
        state = state_for(optimizer, tensor, sorted(kinds))
        if strange := kinds - set(state):
            lacking = ", ".join(sorted(strange))
            raise CheckpointError(
                f"{folder}: {name}: the checkpoint holds {lacking}, which this optimizer does not keep"
            )
        for kind, value in state.items():
            if kind == MASTER:
                targets[f"weight/{name}"] = like(tensor, value)
                filled.append(tensor)
            elif kind in kinds:
                targets[f"{kind}/{name}"] = value if kind == STEP else like(tensor, local(value))
    try:
        dcp.load(targets, storage_reader=reader, process_group=group)
    except CheckpointException as error:
        raise _plain(folder, "read", error) from error
    with torch.no_grad():
        for tensor in filled:
            assert optimizer is not None
            local(tensor).copy_(optimizer.state[tensor][MASTER])


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, whose metadata is unpickled without running anything that a file may name.

    :raises CheckpointError: the metadata is missing, damaged, or holds anything but tensors.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: not readable as a checkpoint's metadata: {error}") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata")
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(item, TensorStorageMetadata):
                raise CheckpointError(f"{path}: {name} is no tensor: only tensors are loaded")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PendingWrite:
    """A write that goes on in the background; ``done`` and ``result`` are a future's."""

    def __init__(self, future: Future[Any], folder: Path) -> None:
        self._future, self._folder = future, folder

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait for the files.

        :raises CheckpointError: a rank could not write.
        """
        try:
            self._future.result(timeout)
        except CheckpointException as error:
            raise _plain(self._folder, "written", error) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if module.startswith("pathlib") and name in _PATHS:  # where it was written; nobody opens it
            return _PATHS[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


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


def _plain(folder: Path, done: str, error: CheckpointException) -> CheckpointError:
    """DCP's exception is no Exception; ours is, and says which rank failed and why."""
    ranks = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
    return CheckpointError(f"{folder} could not be {done}: {ranks}")
