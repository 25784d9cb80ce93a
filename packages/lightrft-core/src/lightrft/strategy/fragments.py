"""The portable format of training state: each rank writes its flat ranges into one safetensors file.

::

    state.json                          whole shape and step of each parameter, number of files
    state-00000-of-00002.safetensors    KIND/NAME/START: flat elements of rank 0, in the state's own dtype
    state-00001-of-00002.safetensors    ... of rank 1

Ranks write in parallel without communication; each of any number of ranks of any backend reads only its ranges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from .errors import CheckpointError
from .host_copies import HostCopies
from .sealed_file import Seals
from .state_source import WEIGHT, Fragment, Placed, StateFormat, StateSource, TensorEntry, read_json
from .tensor_files import TensorFileWriter, stored_tensors, write_tensors

FORMAT = "lightrft-state-1"
INDEX = "state.json"
T = TypeVar("T")


def write(
    fragments: Iterable[Fragment], folder: Path, rank: int, ranks: int, *, copies: HostCopies | None = None
) -> Seals | Future[Seals]:
    """Write this rank's file.

    :param copies: copy the fragments there, and write them from a thread.
    :return: the seal of the file that was written, or with ``copies`` a future of it.
    """
    owned: dict[str, torch.Tensor] = {}
    for fragment in fragments:
        start, values = fragment.written
        if values.numel():
            owned[f"{fragment.kind}/{fragment.name}/{start}"] = values
    path = folder / f"state-{rank:05d}-of-{ranks:05d}.safetensors"
    if copies is None:
        return {path: write_tensors(path, owned)}
    owned = copies.take(owned)
    return in_background(lambda: {path: write_tensors(path, owned)})


def write_index(entries: Mapping[str, tuple[Iterable[int], int]], folder: Path, ranks: int) -> None:
    """Write the part that one rank writes.

    :param entries: whole shape and step by name, in module order.
    """
    tensors = {name: {"shape": list(shape), "step": step} for name, (shape, step) in entries.items()}
    (folder / INDEX).write_text(json.dumps({"format": FORMAT, "files": ranks, "tensors": tensors}))


def open_fragments(folder: Path) -> StateSource:
    """Read the index and the files' headers.

    :raises CheckpointError: a file is missing, truncated, or not of this format.
    """
    index = read_json(folder / INDEX)
    try:
        if index["format"] != FORMAT:
            raise CheckpointError(f"{folder / INDEX}: format {index['format']!r}; this version reads {FORMAT!r}")
        ranks = int(index["files"])
        shapes = {name: (tuple(item["shape"]), int(item["step"])) for name, item in index["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: not an index of training state: {error!r}") from error
    pieces: dict[tuple[str, str], list[Placed]] = {}
    dtypes: dict[str, dict[str, torch.dtype]] = {name: {} for name in shapes}
    for rank in range(ranks):
        path = folder / f"state-{rank:05d}-of-{ranks:05d}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{path}: rank {rank}'s file is missing")
        for key, stored in stored_tensors(path)[0].items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            if name not in shapes:
                raise CheckpointError(f"{path}: holds {key}, which {INDEX} does not list")
            pieces.setdefault((name, kind), []).append((int(start), stored))
            dtypes[name][kind] = stored.dtype
    entries = {
        # An empty tensor has no elements to write.
        name: TensorEntry(shape=shape, dtypes=dtypes[name] or {WEIGHT: torch.float32}, step=step)
        for name, (shape, step) in shapes.items()
    }
    return StateSource(folder, "portable", entries, pieces)


def write_source(
    source: StateSource, folder: Path, *, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> Seals:
    """Write everything of another source as one rank's file, one tensor at a time.

    :param progress: told each tensor's name and bytes.
    :return: the seal of that file.
    """
    sizes = {
        f"{kind}/{name}/0": (dtype, (entry.numel,))
        for name, entry in source.entries.items()
        for kind, dtype in entry.dtypes.items()
    }
    path = folder / "state-00000-of-00001.safetensors"
    with TensorFileWriter(path, sizes) as writer:
        for key in writer.order:
            kind, _, rest = key.partition("/")
            values = source.read(rest.rpartition("/")[0], kind)
            writer.write(key, values)
            progress(key, values.nbytes)
    write_index({name: (entry.shape, entry.step) for name, entry in source.entries.items()}, folder, 1)
    return {path: writer.seal}


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in its own thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


FRAGMENTS = StateFormat(
    name="portable",
    title=f"portable fragments ({INDEX})",
    recognises=lambda folder: (folder / INDEX).is_file(),
    open=open_fragments,
)
