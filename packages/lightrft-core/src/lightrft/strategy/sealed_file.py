"""A file that is digested while it is written and flushed when it is closed, so that it need not be read again."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import xxhash

from .file_progress import came_further

CHUNK = 2**22


class Seal(TypedDict):
    """A file's line in a checkpoint's manifest. ``xxh3``: its 128 bits in hexadecimal."""

    bytes: int
    xxh3: str


Seals = dict[Path, Seal]


class SealedFile:
    """A new file, written from its first byte to its last.

    :raises OSError: here and from every method, what the disk says.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=2**20)
        self._digest, self._size = xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        """Append bytes, or an object with the buffer protocol; returns their number."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self._size += len(view)
        came_further()
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Pass buffered bytes to the system; :meth:`close` flushes them to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Wait until everything is on the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    @property
    def seal(self) -> Seal:
        """Of what has been written so far."""
        return Seal(bytes=self._size, xxh3=self._digest.hexdigest())

    def __enter__(self) -> SealedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self._file.close()
        except OSError:
            pass  # the buffered rest does not fit either; the error that is being raised says why


def seal_of(path: Path, *, flush: bool) -> Seal:
    """The seal of a file that something else wrote; reads it once."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            came_further()
        if flush:
            os.fsync(file.fileno())
    return Seal(bytes=size, xxh3=digest.hexdigest())
