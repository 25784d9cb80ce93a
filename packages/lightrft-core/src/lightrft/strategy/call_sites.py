"""File and line of running code, for messages about operations."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parent)
_LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


def call_site() -> str:
    """The innermost line outside this package and contextlib: the user's call."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename == contextlib.__file__
    ):
        frame = frame.f_back
    return _line(frame)


def stands_at(thread: int) -> str:
    """The line that a thread is at, and the innermost line that is neither Python's nor an installed package's."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    text, user = f"{_line(frame)} ({frame.f_code.co_name})", frame
    while user is not None and user.f_code.co_filename.startswith(_LIBRARIES):
        user = user.f_back
    return text if user is None or user is frame else f"{text}, from {_line(user)}"


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
