"""Claims about an engine's start and end."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch

from lightrft.strategy.engine import RolloutEngine
from lightrft.strategy.errors import EngineStateError, NotBuiltError
from lightrft.strategy.lifecycle import EngineState

from .claims import EngineClaims, MakeEngine
from .parts import GREEDY, PROMPTS, requests_for


class LifeClaims(EngineClaims):
    """What it refuses before and after, and that it leaves nothing behind."""

    def test_an_engine_that_was_not_started_refuses_everything(self, engine: RolloutEngine) -> None:
        idle = type(engine)()
        with pytest.raises(EngineStateError, match="start it first"):
            idle.generate(requests_for(PROMPTS[:1], GREEDY))
        with pytest.raises(EngineStateError, match="start it first"):
            idle.release("kv_cache")
        idle.shutdown()

    def test_shutdown_ends_everything_and_repeats(self, make_engine: MakeEngine, model_folder: str) -> None:
        engine = make_engine(self.spec(model_folder))
        engine.generate(requests_for(PROMPTS[:1], GREEDY))
        engine.shutdown()
        engine.shutdown()
        assert engine.status() == EngineState()
        with pytest.raises(EngineStateError):
            engine.generate(requests_for(PROMPTS[:1], GREEDY))

    def test_shutdown_leaves_no_process_thread_or_shared_memory(
        self, make_engine: MakeEngine, model_folder: str
    ) -> None:
        warm = make_engine(self.spec(model_folder))  # what a library starts once and keeps is not a leak
        warm.generate(requests_for(PROMPTS[:1], GREEDY))
        warm.shutdown()
        before, processes = _remains(), _descendants()
        engine = make_engine(self.spec(model_folder))
        engine.generate(requests_for(PROMPTS[:1], GREEDY))
        family = _descendants() - processes
        engine.shutdown()
        left = {kind: items - before[kind] for kind, items in _remains().items()}
        left["shared memory"] = _leaked(left["shared memory"])
        left["processes"] = _survivors(family | (_descendants() - processes))
        assert left == {kind: set() for kind in left}

    def test_tensor_parallelism_it_lacks_is_refused_with_the_way_out(
        self, engine: RolloutEngine, model_folder: str
    ) -> None:
        if engine.capabilities.tensor_parallel:
            return
        with pytest.raises(NotBuiltError, match=r"--engine_tp_size 2.*vllm or sglang"):
            type(engine)().start(self.spec(model_folder, tensor_parallel_size=2))

    def test_a_device_it_lacks_is_refused(self, engine: RolloutEngine, model_folder: str) -> None:
        with pytest.raises(NotBuiltError, match="does not run on"):
            type(engine)().start(self.spec(model_folder, device=torch.device("meta")))


def _remains() -> dict[str, set[str]]:
    """Threads and shared memory of this process, as far as this system shows them."""
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "shared memory": _shared_memory(),
    }


def _shared_memory() -> set[str]:
    shared = Path("/dev/shm")
    return {file.name for file in shared.iterdir()} if shared.is_dir() else set()


def _leaked(names: set[str], seconds: float = 5.0) -> set[str]:
    """Shared memory that remains and belongs to no other process: others make and remove theirs meanwhile."""
    late = time.monotonic() + seconds
    while (left := names & _shared_memory() - _held_by_others()) and time.monotonic() < late:
        time.sleep(0.05)
    return left


def _held_by_others() -> set[str]:
    """Shared memory that is mapped by processes which this test did not start.

    Files are compared by number: a semaphore is mapped under the temporary name that it had first.
    """
    ours, held = f"PYTEST_CURRENT_TEST={os.environ['PYTEST_CURRENT_TEST']}", set[int]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if process.name != str(os.getpid()) and ours not in (process / "environ").read_text(errors="replace"):
                held |= {int(number) for number in re.findall(r" (\d+) +/dev/shm/", (process / "maps").read_text())}
    shared = Path("/dev/shm")
    return {file.name for file in os.scandir(shared) if file.inode() in held} if shared.is_dir() else set()


def _descendants() -> set[psutil.Process]:
    """The processes that this one started, and theirs."""
    return set(psutil.Process().children(recursive=True))


def _survivors(processes: Iterable[psutil.Process], seconds: float = 5.0) -> set[str]:
    """Those that still run after some time: a killed process takes a moment, and an orphan gets new parents."""
    late = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < late:
        time.sleep(0.05)
    return {str(process) for process in alive}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
