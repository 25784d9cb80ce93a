"""Training state in PyTorch's Distributed Checkpoint format (DCP), read and written without a process group.

Keys are ``weight/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``step/NAME``; keys of any other form are taken for
weights. DCP pickles its metadata: it is read here by an unpickler restricted to DCP's own records, and tensors are read
weights-only.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from .errors import CheckpointError
from .sealed_file import SealedFile, Seals
from .state_source import WEIGHT, FilledByReading, Placed, StateSource, TensorEntry

METADATA, STEP = ".metadata", "step"
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


# ---- reading ---------------------------------------------------------------------------------------------------------
def open_dcp(folder: Path) -> StateSource:
    """Read the metadata.

    :raises CheckpointError: it is missing or damaged, or has anything but tensors that are sharded along the first
        axis.
    """
    metadata = read_metadata(folder)
    dtypes: dict[str, dict[str, torch.dtype]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[tuple[str, str], list[Placed]] = {}
    steps: dict[str, Placed] = {}
    for key, item in metadata.state_dict_metadata.items():
        assert isinstance(item, TensorStorageMetadata)
        kind, _, name = key.partition("/") if "/" in key else (WEIGHT, "", key)
        placed = _pieces(folder, metadata, key, item)
        if kind == STEP:
            steps[name] = placed[0]
            continue
        shapes[name] = tuple(item.size)
        dtypes.setdefault(name, {})[kind] = item.properties.dtype
        pieces[name, kind] = placed
    for name, kinds in dtypes.items():
        if WEIGHT not in kinds:
            raise CheckpointError(f"{folder}: holds {', '.join(kinds)} of {name}, but no weight")
    entries = {
        name: TensorEntry(
            shape=shapes[name], dtypes=dtypes[name], step=int(steps[name][1].read()) if name in steps else 0
        )
        for name in dtypes
    }
    return StateSource(folder, "dcp", entries, pieces)


def read_metadata(folder: Path) -> Metadata:
    """A DCP folder's metadata, without running any code that the file may name.

    :raises CheckpointError: it is missing, damaged, or lists anything but tensors.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint's metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata")
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            raise CheckpointError(f"{path}: {name} is not a tensor: only tensors can be loaded")
    return metadata


@dataclass(frozen=True, kw_only=True)
class _Chunk(FilledByReading):
    """Rows of one tensor, which DCP has written with ``torch.save`` into a part of a file."""

    path: Path
    key: str
    offset: int
    length: int
    numel: int

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                tensor = torch.load(io.BytesIO(file.read(self.length)), map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path}: {self.key} cannot be read, a rank's file is missing or damaged: {error}"
            ) from error
        if not isinstance(tensor, torch.Tensor) or tensor.numel() != self.numel:
            raise CheckpointError(f"{self.path}: {self.key}: {self.numel} elements expected")
        return tensor.reshape(-1)[start:stop]


def _pieces(folder: Path, metadata: Metadata, key: str, item: TensorStorageMetadata) -> list[Placed]:
    placed: list[Placed] = []
    row = torch.Size(item.size[1:]).numel()
    for chunk in item.chunks:
        if chunk.sizes[1:] != item.size[1:]:
            raise CheckpointError(
                f"{folder}: {key} is sharded along an axis other than the first, which is not supported"
            )
        try:
            stored = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            path = folder / str(stored.relative_path)
            if path.parent != folder:
                raise CheckpointError(f"{folder}: {key} is stored in {stored.relative_path}, outside this folder")
            where = _Chunk(path=path, key=key, offset=stored.offset, length=stored.length, numel=chunk.sizes.numel())
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / METADATA}: does not say where {key} is stored: {error!r}") from error
        placed.append((chunk.offsets[0] * row if chunk.offsets else 0, where))
    return placed


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if module.startswith("pathlib") and name in _PATHS:  # where it was written; not opened
            return _PATHS[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


# ---- writing ---------------------------------------------------------------------------------------------------------
def save(
    state: dict[str, torch.Tensor],
    folder: Path,
    *,
    writer_type: type[dcp.FileSystemWriter] = dcp.FileSystemWriter,
    **options: Any,
) -> Seals:
    """``dcp.save`` into a folder, whose files are digested as they are written, and flushed.

    :param options: ``process_group``, ``planner``, ``no_dist``.
    :return: seals of the files that this process wrote.
    :raises CheckpointError: a rank could not write.
    """
    writer = writer_type(folder, sync_files=False)  # its files flush themselves
    writer.fs = files = _SealedFiles()
    try:
        dcp.save(state, storage_writer=writer, **options)
    except CheckpointException as error:
        raise plain_error(folder, "written", error) from error
    return files.seals


class _SealedFiles(FileSystem):
    """Where DCP's writer writes."""

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


def write_source(
    source: StateSource, folder: Path, *, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> Seals:
    """Write everything of another source, only from this process, one tensor at a time.

    :param progress: told each tensor's key and bytes.
    :return: seals of the files.
    """
    keys: dict[str, torch.Tensor] = {}
    for name, entry in source.entries.items():
        for kind, dtype in entry.dtypes.items():
            keys[f"{kind}/{name}"] = torch.empty(entry.shape, dtype=dtype, device="meta")
        if entry.moments:
            keys[f"{STEP}/{name}"] = torch.empty((), dtype=torch.float32, device="meta")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = _FromSource(source, progress)
        return save(keys, folder, writer_type=_FileByFile, planner=planner, no_dist=True)


class _FileByFile(dcp.FileSystemWriter):
    """Starts a new file before one gets larger than the largest tensor.

    DCP's writer keeps the tensors of a file in memory until it is complete, and would put all of them into one.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        sizes = [_nbytes(item) for item in plan.items]
        limit, held, files = max(sizes, default=0), 0, [[]]
        for item, size in zip(plan.items, sizes, strict=True):
            if files[-1] and held + size > limit:
                files.append([])
                held = 0
            files[-1].append(item)
            held += size
        waiting: queue.Queue[Any] = queue.Queue()
        for number, items in enumerate(files):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            waiting.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, waiting)


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


class _FromSource(DefaultSavePlanner):
    """Reads a planned tensor only when it is written."""

    def __init__(self, source: StateSource, progress: Callable[[str, int], None]) -> None:
        super().__init__(flatten_state_dict=False)
        self._source, self._progress = source, progress

    def resolve_data(self, write_item: Any) -> torch.Tensor:
        key = write_item.index.fqn
        kind, _, name = key.partition("/")
        if kind == STEP:
            return torch.tensor(float(self._source.entries[name].step))
        tensor = self._source.whole(name, kind)
        self._progress(key, tensor.nbytes)
        return tensor


def plain_error(folder: Path, done: str, error: CheckpointException) -> CheckpointError:
    """DCP's error is not an Exception; turn it into one of ours, which says which rank failed and why."""
    ranks = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
    return CheckpointError(f"{folder} could not be {done}: {ranks}")
