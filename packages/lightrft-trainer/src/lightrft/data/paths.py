"""Why a path that was given cannot be read, in words. (``Path.is_file`` and its kin raise some of the answers.)"""

from __future__ import annotations

import os
import stat


def fault_of_file(path: str | os.PathLike[str]) -> str | None:
    """None if it is a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return _named(error, "no such file")
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "no regular file, and every rank has to read it; write it to one first"


def fault_of_folder(path: str | os.PathLike[str]) -> str | None:
    """None if it is a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return _named(error, "no such folder")
    return None if stat.S_ISDIR(mode) else "no such folder"


def _named(error: OSError, missing: str) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return missing
    return (error.strerror or str(error)).lower()
