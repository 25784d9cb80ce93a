"""Training state in files of any format: names, shapes, kinds, and any flat range of a tensor.

Every format that we read stores a tensor as contiguous ranges of its flattened elements: ZeRO 1 and 2 split flat
groups, ZeRO-3 flat parameters, FSDP2 and DCP rows. So one index of *pieces* reads them all, and any backend can read
its part of any other's files, on any number of ranks, without communication.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError
from .file_progress import came_further
from .training_state import StateItem

WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A flat range of one tensor on this rank, sharing its memory.

    :param kind: ``weight`` (in the optimizer's precision if it has a copy), ``exp_avg``, ``exp_avg_sq``, ...
    :param start: of the whole tensor's flattened elements, row after row.
    :param owned: the part of ``values``, flat, that this rank writes; the rest is a replica of another rank's, or a
        rounded copy, and is only read.
    """

    name: str
    kind: str
    start: int
    values: torch.Tensor
    owned: slice = field(default_factory=lambda: slice(None))

    @property
    def written(self) -> tuple[int, torch.Tensor]:
        """Start and flat elements of what this rank writes."""
        first, *_ = self.owned.indices(self.values.numel())
        return self.start + first, self.values.detach().reshape(-1)[self.owned]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One module parameter (or persistent buffer) in the files.

    :param dtypes: of each kind that is there. :param step: optimizer steps that it has seen.
    """

    shape: tuple[int, ...]
    dtypes: Mapping[str, torch.dtype]
    step: int = 0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def moments(self) -> list[str]:
        return sorted(kind for kind in self.dtypes if kind != WEIGHT)


class Piece(Protocol):
    """A flat range of one tensor in one file."""

    @property
    def numel(self) -> int: ...
    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Its flat elements ``[start, stop)``."""
        ...

    def fill(self, values: torch.Tensor, start: int = 0) -> None:
        """Fill ``values``, of any shape, dtype and device, with its flat elements from ``start`` on."""
        ...


class FilledByReading:
    """Fills by reading and copying, for files without a shorter way."""

    def fill(self: Piece, values: torch.Tensor, start: int = 0) -> None:
        """See :meth:`Piece.fill`."""
        values.copy_(self.read(start, start + values.numel()).view(values.shape))


Placed = tuple[int, Piece]  # (start in the whole tensor, piece)


class StateSource:
    """Opened files.

    :param folder: named in errors. :param format: the format's name.
    :param entries: the tensors, by module name, in module order.
    :param pieces: by (name, kind), in any order; replicas may be listed more than once.
    :param prefix: of the one transformers model inside the saved module; None: not known.
    :param scalars: what optimizer and scheduler hold besides tensors (see ``checkpoint.SCALARS``), as far as known.
    :raises CheckpointError: a range is missing: a rank's file is absent.
    """

    def __init__(
        self,
        folder: Path,
        format: str,
        entries: Mapping[str, TensorEntry],
        pieces: Mapping[tuple[str, str], Sequence[Placed]],
        *,
        prefix: str | None = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.format, self.entries = folder, format, dict(entries)
        self.prefix, self.scalars = prefix, dict(scalars or {})
        self._pieces = {key: sorted(placed, key=lambda item: item[0]) for key, placed in pieces.items()}
        for name, entry in self.entries.items():
            for kind in entry.dtypes:
                _check_whole(folder, name, kind, entry.numel, self._pieces.get((name, kind), ()))

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The flat elements ``[start, stop)`` of the whole tensor, as fresh CPU memory."""
        entry = self.entries[name]
        stop = entry.numel if stop is None else stop
        values, done = None, start
        for begin, piece in self._pieces[name, kind]:
            end = begin + piece.numel
            if end <= done or begin >= stop:
                continue
            part = piece.read(done - begin, min(end, stop) - begin)
            came_further()
            if values is None and part.numel() == stop - start:
                return part
            if values is None:
                values = torch.empty(stop - start, dtype=entry.dtypes[kind])
            values[done - start : done - start + part.numel()] = part
            done += part.numel()
        return torch.empty(0, dtype=entry.dtypes[kind]) if values is None else values

    def fill(self, values: torch.Tensor, name: str, kind: str, start: int = 0) -> None:
        """Fill ``values``, of any shape, dtype and device, with the flat elements from ``start`` on."""
        done, stop = start, start + values.numel()
        if not values.is_contiguous():
            values.copy_(self.read(name, kind, start, stop).view(values.shape))
            return
        flat = values.view(-1)
        for begin, piece in self._pieces[name, kind]:
            end = min(begin + piece.numel, stop)
            if end > done:
                piece.fill(flat[done - start : end - start], done - begin)
                came_further()
                done = end

    def whole(self, name: str, kind: str = WEIGHT) -> torch.Tensor:
        """A whole tensor in its shape."""
        return self.read(name, kind).view(self.entries[name].shape)

    def items(self) -> Iterator[StateItem]:
        """Everything, one parameter at a time."""
        for name, entry in self.entries.items():
            moments = {kind: self.whole(name, kind) for kind in entry.moments}
            yield StateItem(name=name, weight=self.whole(name), moments=moments, step=entry.step)

    def renamed(self, names: Mapping[str, str]) -> StateSource:
        """The same under other names, without those that ``names`` does not have."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.entries = {new: self.entries[old] for old, new in names.items()}
        other._pieces = {(names[old], kind): placed for (old, kind), placed in self._pieces.items() if old in names}
        return other

    def weights_alone(self) -> StateSource:
        """The same without optimizer states."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.scalars = {}
        other.entries = {
            name: replace(entry, dtypes={WEIGHT: entry.dtypes[WEIGHT]}, step=0) for name, entry in self.entries.items()
        }
        return other

    def named_as(self, shapes: Mapping[str, Sequence[int]], prefix: str = "") -> StateSource:
        """The same under the names of a model that may wrap its transformers model differently.

        :param shapes: the model's, by name. :param prefix: of the transformers model inside it.
        :raises CheckpointError: it is another model's; says the first name or shape that differs.
        """
        theirs = {name: entry.shape for name, entry in self.entries.items()}
        return self.renamed(match_names(self.folder, theirs, self.prefix, shapes, prefix))


@dataclass(frozen=True, kw_only=True)
class StateFormat:
    """A kind of file that training state is kept in.

    :param name: short. :param title: for messages.
    :param recognises: whether a folder has this format. :param open: read its index.
    """

    name: str
    title: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path], StateSource]


@dataclass(frozen=True, kw_only=True)
class PieceOf:
    """Part of a larger piece."""

    piece: Piece
    start: int
    numel: int

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = self.numel if stop is None else stop
        return self.piece.read(self.start + start, self.start + stop)

    def fill(self, values: torch.Tensor, start: int = 0) -> None:
        self.piece.fill(values, self.start + start)


def match_names(
    folder: Path,
    theirs: Mapping[str, Sequence[int]],
    their_prefix: str | None,
    mine: Mapping[str, Sequence[int]],
    my_prefix: str,
) -> dict[str, str]:
    """Map a checkpoint's names to a model's, in the model's order; wrappers may have added prefixes to either.

    :param theirs: shapes by name. :param their_prefix: None: not known; found by trying.
    :raises CheckpointError: it is another model's; says the first name or shape that differs.
    """
    names = {name: name for name in mine if name in theirs}
    bare = {name.removeprefix(my_prefix): name for name in mine}
    for prefix in [their_prefix] if their_prefix is not None else _prefixes(theirs):
        found = {name.removeprefix(prefix): name for name in theirs}
        matched = {found[key]: name for key, name in bare.items() if key in found}
        if len(found) == len(theirs) and len(bare) == len(mine) and len(matched) > len(names):
            names = matched
    back = {new: old for old, new in names.items()}
    for name in mine:
        there = list(theirs[back[name]]) if name in back else "absent"
        if there != list(mine[name]):
            raise CheckpointError(
                f"{folder}: a checkpoint of another model: {name} is {there} there, but {list(mine[name])} here"
            )
    for name in theirs:
        if name not in names:
            raise CheckpointError(
                f"{folder}: a checkpoint of another model: {name} is {list(theirs[name])} there, absent here"
            )
    return names


def share_of(numel: int, index: int, replicas: int) -> slice:
    """The part that one of several replicas writes."""
    return slice(numel * index // replicas, numel * (index + 1) // replicas)


def read_json(path: Path) -> Any:
    """A JSON file.

    :raises CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error


def _prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes that a wrapper may have added to a model's own names: none, or the first part of some name."""
    return ["", *sorted({f"{name.partition('.')[0]}." for name in names if "." in name})]


def _check_whole(folder: Path, name: str, kind: str, numel: int, placed: Sequence[Placed]) -> None:
    done = 0
    for begin, piece in placed:
        if begin > done:
            break
        done = max(done, begin + piece.numel)
    if done < numel:
        raise CheckpointError(
            f"{folder}: {kind} of {name} has no elements from {done} on (of {numel}): a rank's file is missing or "
            "truncated"
        )
