"""A checkpoint on the disk: names, manifest, digests, how it is put into place and when it is removed.

This module is only about files; :mod:`.checkpoint` decides whose state they have and which ranks write them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .disk import folder_size, replace_folder
from .sealed_file import Seal, Seals, seal_of

FORMAT = "lightrft-checkpoint-1"
MANIFEST, CLIENT, LATEST, RANKS = "manifest.json", "client_state.json", "latest", "ranks"
# Small files that one rank flushes at the same time.
THREADS = 8


# ---- which are there -------------------------------------------------------------------------------------------------
def whole_checkpoints(folder: Path) -> list[str]:
    """Tags of the checkpoints in a folder, newest first. A folder with a manifest counts; digests are not checked."""
    found = [(path.parent.stat().st_mtime_ns, path.parent.name) for path in folder.glob(f"*/{MANIFEST}")]
    return [name for _, name in sorted(found, reverse=True) if not name.startswith(".") and is_ours(folder / name)]


def candidates(folder: Path, tag: str | None) -> list[str]:
    """Tags to try, in this order: only the named one, else that of ``latest``, then the others, newest first."""
    if tag is not None:
        return [tag] if (folder / tag).is_dir() else []
    found = whole_checkpoints(folder)
    try:
        newest = (folder / LATEST).read_text().strip()
    except OSError:
        return found
    return [newest, *(name for name in found if name != newest)] if (folder / newest).is_dir() else found


def names(folder: Path) -> list[str]:
    """Folders there, with the error that their manifest gives, if any."""

    def described(path: Path) -> str:
        try:
            (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            return path.name
        except OSError as error:
            return f"{path.name} ({MANIFEST} cannot be read: {error.strerror})"
        return path.name

    return sorted(described(path) for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint that :func:`.checkpoint.save` or a conversion wrote."""
    try:
        return json.loads((folder / MANIFEST).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def is_foreign(path: Path) -> bool:
    """Whether something is there that no save replaces: a file, or files without a manifest."""
    if not path.is_dir():
        return path.exists()
    return any(path.iterdir()) and not (path / MANIFEST).exists()


def is_tag(name: str) -> bool:
    """Whether a checkpoint may have this name: one folder's, which is not hidden and not that of our other file."""
    return Path(name).name == name and not name.startswith(".") and name != LATEST


def default_tag(folder: Path, client_state: Mapping[str, Any] | None) -> str:
    """``step_N`` of the caller's step, else the next free ``save_N``."""
    if client_state and "step" in client_state:
        return f"step_{client_state['step']}"
    number = 0
    while (folder / f"save_{number}").exists():
        number += 1
    return f"save_{number}"


# ---- whether they are whole ------------------------------------------------------------------------------------------
def seal_files(folder: Path, index: int, shares: int, *, flush: bool, known: Container[str] = ()) -> dict[str, Seal]:
    """Seal this share of a folder's files, all but the manifest; with ``flush``, write them to the disk first.

    :param known: names that have seals already.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    rest = [name for name, path in files.items() if path.name != MANIFEST and name not in known][index::shares]
    # Of small files: the time is spent waiting for the disk.
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint") as pool:
        return dict(zip(rest, pool.map(lambda name: seal_of(files[name], flush=flush), rest), strict=True))


def named(seals: Seals, folder: Path) -> dict[str, Seal]:
    """Seals by their files' names within a folder."""
    return {str(path.relative_to(folder)): seal for path, seal in seals.items()}


def write_manifest(
    folder: Path,
    seals: Seals,
    *,
    tag: str,
    strategy: str,
    world_size: int,
    models: Mapping[str, Mapping[str, list[int]]],
) -> None:
    """Mark a folder that one process has filled as a complete checkpoint.

    :param seals: of some of its files; the others are read to digest them.
    :param world_size: ranks whose random states it holds. :param models: shapes by name of each model.
    """
    about = {"format": FORMAT, "tag": tag, "strategy": strategy, "world_size": world_size, "models": models}
    known = named(seals, folder)
    files = known | seal_files(folder, 0, 1, flush=False, known=known)
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1))


def damage(folder: Path, index: int = 0, shares: int = 1) -> str | None:
    """What is wrong with this share of a checkpoint's files, or None. Every digest is checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name, item in files[index::shares]:
        path = folder / name
        try:
            if path.stat().st_size != item["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {item['bytes']}"
            if seal_of(path, flush=False)["xxh3"] != item["xxh3"]:
                return f"{name} was altered: its digest differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read by rank {index}: {error.strerror}"
    return None


# ---- coming and going ------------------------------------------------------------------------------------------------
def publish(staging: Path, final: Path) -> None:
    """Flush a folder and rename it into its place; what was there is removed last."""
    for path in staging.rglob("*"):
        if path.is_file():
            _flush(path)
    _flush_folders(staging)
    replace_folder(staging, final)
    _flush(final.parent)


def publish_save(
    staging: Path,
    final: Path,
    manifest: Mapping[str, Any],
    files: Mapping[str, Seal],
    *,
    latest: bool,
    max_num: int | None,
    max_mem: float | None,
) -> None:
    """Rename a temporary folder with flushed files to the checkpoint, then update ``latest``, then prune."""
    _write_flushed(staging / MANIFEST, json.dumps({**manifest, "files": files}, indent=1))
    for newest in whole_checkpoints(final.parent)[:1]:
        before = (final.parent / newest).stat().st_mtime_ns
        if staging.stat().st_mtime_ns <= before:  # the clock was set back; which is newest is read from these times
            os.utime(staging, ns=(before + 10**9, before + 10**9))
    _flush_folders(staging)
    replace_folder(staging, final)
    if latest:
        _write_flushed(final.parent / f".{LATEST}", final.name)
        (final.parent / f".{LATEST}").rename(final.parent / LATEST)
    _flush(final.parent)
    _prune(final, max_num, max_mem)


def _prune(newest: Path, max_num: int | None, max_mem: float | None) -> None:
    """Remove our oldest checkpoints beyond the limits; the one just written always stays."""
    kept = [newest.name]
    total = folder_size(newest)
    for name in whole_checkpoints(newest.parent):
        if name == newest.name:
            continue
        total += folder_size(newest.parent / name)
        if (max_num is not None and len(kept) >= max_num) or (max_mem is not None and total > max_mem * 1e9):
            doomed = newest.parent / f".{name}.old"
            (newest.parent / name).rename(doomed)  # never a half-deleted folder under a checkpoint's name
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            kept.append(name)


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush_folders(folder: Path) -> None:
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
