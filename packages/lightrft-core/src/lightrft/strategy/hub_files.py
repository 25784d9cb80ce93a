"""Hugging Face model folders: safetensors shards with an index, read and written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from .errors import CheckpointError
from .hub_layout import HubTensor
from .state_source import WEIGHT, FilledByReading, StateSource, TensorEntry, read_json
from .tensor_files import StoredTensor, TensorFileWriter, stored_tensors

WEIGHTS, WEIGHTS_INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def is_hub_folder(folder: Path) -> bool:
    """Whether it has a configuration and safetensors files."""
    return (folder / CONFIG).is_file() and next(folder.glob("*.safetensors"), None) is not None


def hub_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a hub folder, by name.

    :raises CheckpointError: a file is missing or damaged, or has not all tensors of the index.
    """
    if not (folder / WEIGHTS_INDEX).is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{folder}: holds no safetensors file")
        return {key: tensor for name in names for key, tensor in stored_tensors(folder / name)[0].items()}
    weight_map = _weight_map(folder)
    files = {name: stored_tensors(folder / name)[0] for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        if key not in files[name]:
            raise CheckpointError(f"{folder / name}: has no {key}, which {WEIGHTS_INDEX} lists")
    return {key: files[name][key] for key, name in weight_map.items()}


def _weight_map(folder: Path) -> dict[str, str]:
    """Hub name to file, by a folder's index.

    :raises CheckpointError: it is not an index, or names files that are missing or outside the folder.
    """
    index = read_json(folder / WEIGHTS_INDEX)
    if not isinstance(index, dict) or not isinstance(weight_map := index.get("weight_map"), dict):
        raise CheckpointError(f"{folder / WEIGHTS_INDEX}: not an index of safetensors files: it has no weight_map")
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / WEIGHTS_INDEX}: names {name!r}, outside this folder")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: lacks {', '.join(missing)}, which {WEIGHTS_INDEX} lists; copy or download the model again"
        )
    return weight_map


def pretrained_files(name: str) -> dict[str, Path]:
    """Hub name to safetensors file, of a folder or of a hub name in the local cache; empty if there is none.

    :raises CheckpointError: an index names files that are missing.
    """
    if not name:
        return {}
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        found = None
        for file in (WEIGHTS_INDEX, WEIGHTS):
            try:
                found = found or cached_file(name, file, local_files_only=True)
            except OSError:  # not in the cache
                continue
        if found is None:
            return {}
        folder = Path(found).parent
    files: dict[str, Path] = {}
    if (folder / WEIGHTS_INDEX).is_file():
        paths = {folder / file for file in _weight_map(folder).values()}
    else:
        paths = set(folder.glob("*.safetensors"))
    for path in sorted(paths):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def hub_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(hub name, whole tensor), one at a time."""
    for name, stored in hub_index(folder).items():
        yield name, stored.read().view(stored.shape)


# ---- as training state -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Assembled(FilledByReading):
    """A module tensor that consists of several hub tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[HubTensor, StoredTensor], ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype)
        for hub, stored in self.parts:
            hub.view(whole).copy_(stored.read().view(stored.shape))
        return whole.view(-1)[start:stop]


def open_hub(folder: Path, tensors: Sequence[HubTensor], shapes: Mapping[str, Sequence[int]]) -> StateSource:
    """A hub folder as training state under module names; only weights.

    :param tensors: the model's hub tensors. :param shapes: whole shape of each of its module tensors.
    :raises CheckpointError: the first hub tensor that is absent or has another shape.
    """
    index = hub_index(folder)
    parts: dict[str, list[tuple[HubTensor, StoredTensor]]] = {name: [] for name in shapes}
    for hub in tensors:
        stored = index.get(hub.name)
        if stored is None or stored.shape != hub.shape:
            there = "absent" if stored is None else list(stored.shape)
            raise CheckpointError(
                f"{folder}: another model's weights: {hub.name} is {there} there, {list(hub.shape)} here"
            )
        parts[hub.source].append((hub, stored))
    entries, pieces = {}, {}
    for name, shape in shapes.items():
        # Every module tensor has hub names: all are in the layout.
        dtype = parts[name][0][1].dtype
        entries[name] = TensorEntry(shape=tuple(shape), dtypes={WEIGHT: dtype})
        pieces[name, WEIGHT] = [(0, _Assembled(shape=tuple(shape), dtype=dtype, parts=tuple(parts[name])))]
    return StateSource(folder, "hf", entries, pieces, prefix="")


# ---- writing ---------------------------------------------------------------------------------------------------------
def shard_names(count: int) -> list[str]:
    """The hub's names for ``count`` weight files: one plain file, or numbered ones."""
    return [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_shard_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of several weight files; one file needs none.

    :param weight_map: file by hub name.
    """
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2))


def plan_files(
    tensors: Sequence[HubTensor], max_bytes: int, dtypes: Mapping[str, torch.dtype]
) -> dict[str, list[HubTensor]]:
    """Assign tensors to files; a tensor above the limit gets its own file.

    :param dtypes: by source.
    """
    groups: list[list[HubTensor]] = []
    room = 0
    for tensor in tensors:
        size = torch.Size(tensor.shape).numel() * dtypes[tensor.source].itemsize
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= size
    return dict(zip(shard_names(len(groups)), groups, strict=True))


def write_hub(
    source: StateSource,
    tensors: Sequence[HubTensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int = 5 * 10**9,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
    whole: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write the weights under their hub names, one module tensor at a time.

    :param dtype: cast floating-point tensors; None keeps the precision that they are stored in.
    :param max_bytes: of one file. :param progress: told each tensor's name and bytes.
    :param whole: returns a whole module tensor, if it is more than ``source`` has under its name.
    """
    read = source.whole if whole is None else whole
    dtypes = {name: cast_dtype(entry.dtypes[WEIGHT], dtype) for name, entry in source.entries.items()}
    files = plan_files(tensors, max_bytes, dtypes)
    held, of = torch.empty(0), None
    for name, group in files.items():
        by_name = {hub.name: hub for hub in group}
        specs = {hub.name: (dtypes[hub.source], hub.shape) for hub in group}
        with TensorFileWriter(folder / name, specs, metadata={"format": "pt"}) as writer:
            for key in writer.order:
                hub = by_name[key]
                if hub.source != of:
                    del held  # before the next is read: only one module tensor is in memory at a time
                    held, of = read(hub.source), hub.source
                tensor = hub.view(held).to(dtypes[hub.source]).contiguous()
                writer.write(key, tensor)
                progress(key, tensor.nbytes)
    total = sum(torch.Size(hub.shape).numel() * dtypes[hub.source].itemsize for hub in tensors)
    write_shard_index(folder, {hub.name: name for name, group in files.items() for hub in group}, total)


def cast_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is written: only floating-point tensors are cast."""
    return wanted if wanted is not None and own.is_floating_point else own
