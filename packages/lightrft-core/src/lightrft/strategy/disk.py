"""Folders on a disk: putting a new one in its place, and explaining a full disk."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .blame import is_lost_peer
from .errors import CheckpointError

# Libraries written in C++ and Rust raise their own errors with the system's message in them; torch's writer only
# notices that not all bytes were written.
_FULL = ("no space left", "quota exceeded", "file too large", "unexpected pos")
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explain_write(staging: Path, target: Path, needed: int) -> Iterator[None]:
    """Wraps the filling of ``staging``, which will become ``target``: its errors become a :class:`CheckpointError`.

    :param needed: bytes that it will take in all, about.
    :raises CheckpointError: a file could not be written; for a full disk, how much space was missing.
    """
    try:
        yield
    except Exception as error:
        if is_lost_peer(error) or not (isinstance(error, OSError) or is_full(error)):
            raise
        shortage = f". {describe_shortage(staging, needed)}" if is_full(error) else ""
        raise CheckpointError(
            f"{target} could not be written: {error}{shortage}. What was there before is unchanged"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that a disk, a quota or a limit is exhausted."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in _FULL_NUMBERS or any(sign in str(cause).lower() for sign in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def describe_shortage(staging: Path, needed: int) -> str:
    """How much space was needed, available and missing; call it before ``staging`` is removed."""
    there = next(folder for folder in (staging, *staging.parents) if folder.exists())  # the disk may lack room for it
    room = shutil.disk_usage(there).free + folder_size(staging)
    if room >= needed:
        return (
            f"It takes about {human_bytes(needed)}, and the disk has room for {human_bytes(room)}: "
            "a quota or a limit on file sizes (ulimit -f) prevents it"
        )
    return (
        f"It takes about {human_bytes(needed)}, there was room for {human_bytes(room)}: "
        f"{human_bytes(needed - room)} are missing; free them, or keep fewer checkpoints (--max_ckpt_num)"
    )


def replace_folder(staging: Path, target: Path) -> None:
    """Put the new folder in place of the old one, which is removed last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def staging_for(target: Path) -> Path:
    """Where to write what :func:`settle` will put at ``target``.

    Within a folder that exists, since it may be a mount or the working directory; else beside it.
    """
    return target / ".partial" if target.is_dir() else target.with_name(f".{target.name}.partial")


def settle(staging: Path, target: Path, *, stale: Iterable[str], last: str) -> None:
    """Put the new folder in its place. In a folder that exists, files of other names stay; all do if that fails.

    :param stale: patterns of files that are removed as well: an older one's, which would be read with the new ones.
    :param last: the file that comes last, without which nobody reads the others.
    """
    if not target.exists():
        staging.rename(target)
        return
    new = sorted(staging.iterdir(), key=lambda path: path.name == last)
    replaced = {place for path in new if (place := target / path.name).exists()}
    outdated = sorted(replaced.union(*(target.glob(pattern) for pattern in stale)), key=lambda path: path.name != last)
    old = staging / ".old"
    moves = [*((path, old / path.name) for path in outdated), *((path, target / path.name) for path in new)]
    done: list[tuple[Path, Path]] = []
    try:
        old.mkdir()
        for source, place in moves:
            source.rename(place)
            done.append((source, place))
    except OSError:
        for source, place in reversed(done):
            place.rename(source)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def folder_size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def human_bytes(count: float) -> str:
    """``1500000`` as ``1.5 MB`` (decimal units)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
