"""Safetensors files written and read piece by piece, through plain file calls.

The library's own ``save_file`` wants all tensors at once and makes files that nobody else may read, whatever the umask
(https://github.com/huggingface/safetensors/issues/782), and its reader maps whole files. Here a file is written tensor
by tensor, and any flat range of a tensor is read into fresh memory: a conversion holds one tensor, whatever the size of
the model. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .errors import CheckpointError
from .sealed_file import Seal, SealedFile

MAX_HEADER_BYTES = 100 * 2**20  # the library's own limit
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class TensorFileWriter:
    """Writes one file and flushes it; tensors are handed over one by one, in the order of :attr:`order`.

    :param tensors: dtype and shape of everything that will come, by name.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        # Wide elements first, so that everything stays aligned to its own size.
        self.order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        self._tensors, self._next = tensors, 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in self.order:
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = SealedFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of :attr:`order`."""
        dtype, shape = self._tensors[name]
        assert name == self.order[self._next], f"{name} out of turn"
        assert tensor.dtype == dtype and tensor.numel() == math.prod(shape), name
        self._file.write(byte_view(tensor.detach().to("cpu").contiguous()))
        self._next += 1

    def close(self) -> None:
        """Finish the file, which is on the disk then.

        :raises AssertionError: something was announced and did not come.
        """
        self._file.close()
        assert self._next == len(self.order), f"{self.order[self._next]} is missing"

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace) if kind else self.close()

    @property
    def seal(self) -> Seal:
        """Size and digest of what has been written."""
        return self._file.seal


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Seal:
    """Write one file of tensors that are all there, and flush it; returns its seal."""
    with TensorFileWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    return writer.seal


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A contiguous tensor somewhere in a file. :param offset: its first byte."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The flat elements ``[start, stop)``, as fresh memory.

        :raises CheckpointError: the file cannot be read, or ends before they do.
        """
        stop = self.numel if stop is None else stop
        values = torch.empty(stop - start, dtype=self.dtype)
        self.fill(values, start)
        return values

    def fill(self, values: torch.Tensor, start: int = 0) -> None:
        """Put the flat elements from ``start`` on into all of ``values``, straight from the file where it can.

        :raises CheckpointError: as :meth:`read`.
        """
        if values.dtype != self.dtype or values.device.type != "cpu" or not values.is_contiguous():
            values.copy_(self.read(start, start + values.numel()).view(values.shape))
            return
        wanted = byte_view(values.detach())
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                done = 0
                while done < len(wanted) and (count := file.readinto(wanted[done:])):
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: {self.name} cannot be read: {error}") from error
        if done < len(wanted):
            raise CheckpointError(f"{self.path}: is truncated: {len(wanted) - done} bytes of {self.name} are missing")


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What a safetensors file holds, by name, and its metadata. Reads the header alone.

    :raises CheckpointError: it is missing, cut short or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: a header of {length} bytes in {size}"
                )
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        found = {
            name: StoredTensor(
                path=path,
                name=name,
                dtype=_DTYPES[item["dtype"]],
                shape=tuple(item["shape"]),
                offset=8 + length + item["data_offsets"][0],
            )
            for name, item in header.items()
        }
        ends = [8 + length + item["data_offsets"][1] for item in header.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as a safetensors file: {error}") from error
    if ends and max(ends) > size:
        raise CheckpointError(f"{path}: is truncated: {size} bytes of {max(ends)}")
    return found, metadata


def byte_view(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, as bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(bytearray())
