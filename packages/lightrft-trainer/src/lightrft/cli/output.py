"""Output that outlives its reader: a run whose terminal or pipe is closed still finishes its step and writes a
checkpoint."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import Any, TextIO

READER_GONE = (errno.EIO, errno.EPIPE)  # of a terminal, of a pipe


class _Watched(io.FileIO):
    """A descriptor with a reader, which becomes the null device when the reader has gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for other writers in this process too, such as libraries in C++
            os.close(nowhere)
            return super().write(data)


def outlive_reader() -> None:
    """Let standard output and error go on without an error when their terminal is closed, or ``tee`` has ended; a
    character that they cannot encode, such as one of an answer in the locale C, is written as ``\\xe9``.
    """
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO) -> TextIO:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no stream, no descriptor, or closed
        return stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    if not (stream.isatty() or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Watched(stream.fileno(), "w", closefd=False))
    line_buffering = getattr(stream, "line_buffering", True)
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=line_buffering)
