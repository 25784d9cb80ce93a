"""File and line of running code, for messages about operations."""

from __future__ import annotations

import contextlib
import faulthandler
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parent)
_LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
# Of a dump of faulthandler, which leaves out the oldest of many threads.
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+).*\n((?:  .*\n)*)", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\S+) in (.*)$', re.MULTILINE)
_MOST_THREADS = 100


def call_site() -> str:
    """The innermost line outside this package and contextlib: the user's call."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename == contextlib.__file__
    ):
        frame = frame.f_back
    return _line(frame)


def stands_at(thread: int) -> str:
    """The line that a thread is at, and the innermost line that is neither Python's nor an installed package's.

    For a process that is failing anyway: to look at a running thread now and then crashes Python. It does so least by
    faulthandler's dump, which needs no frame objects; those of ``sys._current_frames()`` crash Python 3.11
    (https://github.com/getsentry/sentry-python/issues/2386), and the dump, hundreds of times a minute, Python 3.13.0.
    """
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            dump = file.read().decode("unicode_escape", errors="replace")
    except OSError:  # the disk is full, or no more files may be opened
        return "an unknown line"
    stacks = {int(found[1], 16): _FRAME.findall(found[2]) for found in _THREAD.finditer(dump)}
    frames = stacks.get(thread)
    if not frames:
        return "its end" if frames is None and len(stacks) < _MOST_THREADS else "an unknown line"
    path, line, function = frames[0]
    user = next((frame for frame in frames if not frame[0].startswith(_LIBRARIES)), frames[0])
    text = f"{path}:{line} ({function})"
    return text if user is frames[0] else f"{text}, from {user[0]}:{user[1]}"


def origin(error: BaseException) -> str:
    """The line that raised an error."""
    trace = error.__traceback__
    if trace is None:
        return "an unknown line"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
