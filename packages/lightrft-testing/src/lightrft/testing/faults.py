"""Fault injection: a process that dies at a given point, files that are truncated or altered."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch

from lightrft.strategy.sealed_file import SealedFile
from lightrft.strategy.weights import WeightBucket

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase

TensorFault = Literal["dropped", "doubled", "truncated", "misnamed", "stale"]


@contextlib.contextmanager
def calling_first(owner: Any, name: str, action: Callable[[], None], *, nth: int = 1) -> Iterator[None]:
    """Within it, the ``nth`` call (from 1) of ``owner.name`` first does ``action``."""
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def disturbed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, disturbed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def die() -> None:
    """End this process as ``kill -9`` would: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch_file_events(folder: Path, action: Callable[[int], Any]) -> None:
    """Call ``action(count)`` before each of this process's file operations below ``folder``, until the process ends.

    Opening, renaming, removing and creating count, so every moment of a save can be hit with any backend.
    """
    below = str(folder.resolve())
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _FILE_EVENTS or not args or not isinstance(args[0], (str, os.PathLike)):
            return
        if os.path.abspath(os.fspath(args[0])).startswith(below):
            count += 1
            action(count)

    sys.addaudithook(hook)


@contextlib.contextmanager
def refusing_files(folder: Path, error: OSError) -> Iterator[None]:
    """Within it, this process cannot open files below ``folder``, as if a disk or a mount failed on one machine."""
    below, active = str(folder.resolve()), True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if active and event == "open" and args and isinstance(args[0], (str, os.PathLike)):
            if os.path.abspath(os.fspath(args[0])).startswith(below):
                raise error

    sys.addaudithook(hook)
    try:
        yield
    finally:
        active = False


@contextlib.contextmanager
def limited_file_size(nbytes: int) -> Iterator[None]:
    """Within it, no file of this process grows beyond ``nbytes``: a full disk without mounting one. POSIX."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Within it ``folder`` is a disk of ``nbytes`` in memory.

    :raises PermissionError: this process may not mount; the message says what to do.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "lightrft-small-disk", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = done.stderr.strip()
    except FileNotFoundError as error:
        problem = str(error)
    if problem or not os.path.ismount(folder):
        raise PermissionError(
            f"a small disk cannot be mounted here ({problem}): run as root on Linux, in a container with "
            "--cap-add SYS_ADMIN"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


_FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"})


@contextlib.contextmanager
def background_writes_held_back() -> Iterator[None]:
    """Within it only the main thread writes into a checkpoint's files."""
    write, ready = SealedFile.write, threading.Event()

    def later(file: SealedFile, data: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            ready.wait()
        return write(file, data)

    with mock.patch.object(SealedFile, "write", later):
        try:
            yield
        finally:
            ready.set()


def cut(path: Path, share: float = 0.5) -> None:
    """Keep only the first ``share`` of a file, as a full disk or a crash would."""
    os.truncate(path, int(path.stat().st_size * share))


def flip_bit(path: Path, position: int | None = None) -> None:
    """Alter one bit, by default in the middle of the file."""
    data = bytearray(path.read_bytes())
    index = len(data) // 2 if position is None else position
    data[index] ^= 1
    path.write_bytes(data)


@contextlib.contextmanager
def faulty_sync(strategy: StrategyBase, fault: TensorFault, name: str) -> Iterator[None]:
    """Within it, the tensor ``name`` is corrupted on this rank, between the strategy's export and the engine.

    "stale": the values of an earlier sync are sent, here zeros. Sampled verification cannot find it, since the trainer
    sent them; ``verify_weights="full"`` does: it exports again, and only the first export is disturbed.
    """
    original = strategy.export_weights
    exports = 0

    def export(*args: Any, **kwargs: Any) -> Iterator[WeightBucket]:
        nonlocal exports
        exports += 1
        buckets = original(*args, **kwargs)
        return (part for bucket in buckets for part in _spoiled(bucket, fault, name)) if exports == 1 else buckets

    strategy.export_weights = export
    try:
        yield
    finally:
        del strategy.export_weights


def _spoiled(bucket: WeightBucket, fault: TensorFault, name: str) -> Iterator[WeightBucket]:
    """The bucket that is sent instead."""
    tensors = dict(bucket.tensors)
    tensor = tensors.pop(name, None)
    if tensor is None or fault == "doubled":
        yield bucket
    if tensor is None:
        return
    arriving = {
        "dropped": tensors,
        "doubled": {name: tensor},
        "truncated": {**tensors, name: tensor[:-1]},
        "misnamed": {**tensors, f"{name}.renamed": tensor},
        "stale": {**tensors, name: torch.zeros_like(tensor)},
    }[fault]
    yield WeightBucket(bucket.index, arriving)


def poison_gradient(model: torch.nn.Module, value: float = float("nan")) -> None:
    """Put a value that is not finite into this rank's first gradient."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[attr-defined]
            if local.numel():
                local.view(-1)[0] = value
                return
    raise ValueError("no parameter has a gradient: call backward first")
