"""Output that outlives its terminal: a run whose terminal is closed still finishes its step and writes a checkpoint."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


class _Terminal(io.FileIO):
    """A terminal's descriptor, which becomes the null device when the terminal has been closed."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for other writers in this process too, such as libraries in C++
            os.close(nowhere)
            return super().write(data)


def outlive_terminal() -> None:
    """Let standard output and error go on without an error when their terminal is closed."""
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO) -> TextIO:
    if not stream.isatty():
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
