"""Ranks for tests: processes that stay alive between tests, each with its place in a process group.

Importing torch and transformers takes longer than most tests. So a :class:`RankPool` imports them once, in a server
process, from which it forks its ranks: a pool starts, and restarts after a rank was killed, in a moment. Each run gets
a new key-value store, hosted by the test process like torchrun's agent, so that ``strategy.setup_distributed()`` joins
the ranks as under torchrun.

Ranks end with the test process, however it ends. POSIX only.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy
import torch
import torch.distributed as dist

PRELOAD = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "lightrft.strategy",
    "lightrft.deepspeed",
    "lightrft.fsdp",
    "lightrft.testing.strategy_suite",
    "lightrft.trainer.run",
    "torchdata.stateful_dataloader",
)
# DeepSpeed, and torch's compiler, which it imports when it first shards a model. Importing it initialises devices, and
# CUDA does not survive a fork: with devices, each rank imports it.
PRELOAD_WITHOUT_DEVICES = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pydantic.dataclasses",
)
# Imports of a vLLM engine, for pools that start one.
PRELOAD_VLLM = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")
# One thread per rank: ranks share the cores, and sums do not depend on the split of a loop.
RANK_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Seconds in which the others must fail too when a rank has failed, for which they may wait.
GRACE = 2.0
SHOWN_OUTPUT = 4000
SHOWN_LOCAL = 200


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one rank in one run.

    :param value: what the function returned, tensors on the CPU.
    :param error: the exception's type, message and remote traceback; None if it returned.
    :param exception: the exception itself, if it can be pickled.
    :param died: the exit code (negative: the signal) of a rank that has ended; None while it runs.
    :param late: the rank had not finished in time; ``error`` shows where it was.
    """

    rank: int
    value: Any = None
    error: str | None = None
    exception: BaseException | None = None
    died: int | None = None
    late: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None


class RankFailure(AssertionError):  # noqa: N818 - a better name than with Error
    """Some ranks failed, died or were late; the message holds each one's traceback and output."""

    def __init__(self, name: str, outcomes: Sequence[Outcome], outputs: Sequence[str]) -> None:
        self.outcomes = list(outcomes)
        failed = [outcome for outcome in outcomes if not outcome.ok]
        # Those that failed by themselves come first; the others mostly report that they waited for them.
        failed.sort(key=lambda outcome: (outcome.late, outcome.rank))
        parts = [f"{name} failed on rank {', '.join(str(o.rank) for o in sorted(failed, key=lambda o: o.rank))}"]
        for outcome in failed:
            parts.append(f"---- rank {outcome.rank}\n{outcome.error}")
            if output := outputs[outcome.rank].strip():
                parts.append(f"---- output of rank {outcome.rank}\n{output[-SHOWN_OUTPUT:]}")
        super().__init__("\n".join(parts))


class RankPool:
    """``world_size`` ranks on this machine that run one function after the other, together.

    :param timeout: seconds that a run may take unless it says otherwise.
    :param env: further environment variables of the ranks.
    :param preload: modules imported before the fork; missing ones are skipped.
    """

    def __init__(
        self,
        world_size: int,
        *,
        timeout: float = 180.0,
        env: Mapping[str, str] | None = None,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size = {world_size}: a pool needs at least one rank")
        self.world_size, self.timeout = world_size, timeout
        self._preload, self._env = list(preload), dict(env or {})
        if not torch.accelerator.is_available():
            self._preload += PRELOAD_WITHOUT_DEVICES
            self._env.setdefault("DS_ACCELERATOR", "cpu")
        self._ranks: list[_Rank] = []
        self._logs: tempfile.TemporaryDirectory[str] | None = None
        self._job: RankJob | None = None
        self._outputs = [""] * world_size
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank and return the results, in rank order.

        :param function: a function at a module's top level, or a static or class method; it is sent by name.
        :raises RankFailure: a rank raised, died or was late. The next run gets new ranks.
        """
        return self.submit(function, *args, **kwargs).results(timeout)

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> RankJob:
        """Start a run and return at once, so that it can be disturbed: see :class:`RankJob`."""
        reference = FunctionReference.of(function)
        if self._job is not None:
            self._job.cancel()
        if not self._ranks or not all(rank.process.is_alive() for rank in self._ranks):
            self.restart()
        self._job = RankJob(self, reference, args, kwargs)
        return self._job

    def output(self, rank: int) -> str:
        """What a rank wrote to stdout and stderr in the latest run."""
        return self._ranks[rank].output() if self._ranks else self._outputs[rank]

    def pids(self) -> list[int]:
        """Process ids of the running ranks, in rank order."""
        return [rank.pid for rank in self._ranks]

    def restart(self) -> None:
        """End the ranks and start new ones."""
        self._stop()
        self._logs = tempfile.TemporaryDirectory(prefix="lightrft-ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightrft.testing.unwatched_imports", *self._preload])
        with _environment({**RANK_ENV, **self._env}):  # the server keeps the environment that it starts with
            self._ranks = [
                _Rank(context, rank, self.world_size, Path(self._logs.name, f"{rank}.log"), self._env)
                for rank in range(self.world_size)
            ]

    def close(self) -> None:
        """End the ranks. Repeating it does nothing; a later run starts them again."""
        atexit.unregister(self.close)
        self._stop()

    def _stop(self) -> None:
        self._outputs = [rank.output() for rank in self._ranks] or self._outputs
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        if self._logs is not None:
            self._logs.cleanup()
            self._logs = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class RankJob:
    """A run in progress. End it with :meth:`results` or :meth:`outcomes`."""

    def __init__(self, pool: RankPool, reference: FunctionReference, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._pool, self.name = pool, reference.qualname
        self._ranks = pool._ranks
        self._outcomes: dict[int, Outcome] = {}
        self._said: list[set[str]] = [set() for _ in self._ranks]
        # A store for each run, hosted here: it outlives any rank.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        payload = pickle.dumps((args, dict(kwargs)))
        for rank in self._ranks:
            rank.begin(("run", reference, payload, self._store.port))

    def wait_for(self, rank: int, text: str, timeout: float | None = None) -> None:
        """Wait until a rank has called ``announce(text)``.

        :raises RankFailure: it ended, or ``timeout`` seconds passed.
        """
        deadline = time.monotonic() + (self._pool.timeout if timeout is None else timeout)
        while text not in self._said[rank]:
            if rank in self._outcomes or not self._pump(deadline):
                before = self._outcomes.get(rank)
                if before is None or before.ok:
                    self._outcomes[rank] = Outcome(rank=rank, error=f"never announced {text!r}", late=before is None)
                self._fail()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal: SIGKILL a rank, SIGSTOP it as a stalled machine would, SIGCONT it."""
        os.kill(self._ranks[rank].pid, number)

    def outcomes(
        self, timeout: float | None = None, *, grace: float | None = None, of: Sequence[int] | None = None
    ) -> list[Outcome]:
        """Wait until every rank has returned, raised or died; those that do not in time are late. Raises nothing.

        :param timeout: seconds; default: the pool's.
        :param grace: seconds for the others once a rank has failed; None: the rest of the time.
        :param of: wait for these ranks only; None: for all.
        """
        awaited = set(range(len(self._ranks)) if of is None else of)
        deadline = time.monotonic() + (self._pool.timeout if timeout is None else timeout)
        while awaited - self._outcomes.keys():
            if grace is not None and any(not outcome.ok for outcome in self._outcomes.values()):
                deadline, grace = min(deadline, time.monotonic() + grace), None
            if not self._pump(deadline):
                break
        for rank in self._ranks:
            if rank.index not in self._outcomes:
                stood = rank.where()
                self._outcomes[rank.index] = Outcome(
                    rank=rank.index, error=f"had not finished; it stood at\n{stood}", late=True
                )
        outcomes = [self._outcomes[rank.index] for rank in self._ranks]
        if all(outcome.ok for outcome in outcomes):
            self._clean()
        else:
            self._pool._stop()  # the remaining ranks cannot be used again
        self._pool._job = None
        return outcomes

    def results(self, timeout: float | None = None) -> list[Any]:
        """The result of each rank. :raises RankFailure: a rank raised, died or was late."""
        outcomes = self.outcomes(timeout, grace=GRACE)
        if any(not outcome.ok for outcome in outcomes):
            raise RankFailure(self.name, outcomes, self._pool._outputs)
        return [outcome.value for outcome in outcomes]

    def cancel(self) -> None:
        """Give a run up; the next one gets new ranks."""
        self._pool._stop()
        self._pool._job = None

    def _fail(self) -> None:
        for rank in self._ranks:
            self._outcomes.setdefault(rank.index, Outcome(rank=rank.index, error="was given up", late=True))
        self._pool._stop()
        self._pool._job = None
        raise RankFailure(self.name, [self._outcomes[rank.index] for rank in self._ranks], self._pool._outputs)

    def _pump(self, deadline: float) -> bool:
        """Take what ranks have to say; False when the deadline has passed."""
        waiting = [rank for rank in self._ranks if rank.index not in self._outcomes]
        sources = {rank.pipe: rank for rank in waiting} | {rank.process.sentinel: rank for rank in waiting}
        ready = multiprocessing.connection.wait(list(sources), max(0.0, deadline - time.monotonic()))
        for rank in {sources[source].index: sources[source] for source in ready}.values():
            message = rank.receive()
            if message is None:
                self._outcomes[rank.index] = rank.death()
            elif message[0] == "said":
                self._said[rank.index].add(message[1])
            else:
                self._outcomes[rank.index] = _outcome(rank.index, message)
        return bool(ready)

    def _clean(self) -> None:
        """All have returned: leave the process groups together, so that no rank sees another hang up."""
        for rank in self._ranks:
            rank.send(("clean",))
        deadline = time.monotonic() + 30
        for rank in self._ranks:
            message = rank.receive(max(0.0, deadline - time.monotonic()))
            if message is None or message[0] != "cleaned":
                self._pool._stop()
                return


@dataclass(frozen=True, kw_only=True)
class FunctionReference:
    """A function by file and name, which works for modules that cannot be imported by name, such as pytest's test
    modules."""

    module: str
    file: str
    qualname: str

    @classmethod
    def of(cls, function: Callable[..., Any] | type) -> FunctionReference:
        """:raises ValueError: the function has no name that another process could find."""
        qualname = getattr(function, "__qualname__", "<unnamed>")
        if "<" in qualname:
            raise ValueError(f"{qualname} cannot travel to another process: put it at the top level of its module")
        return cls(module=function.__module__, file=inspect.getfile(function), qualname=qualname)

    def resolve(self) -> Any:
        """The function, in this process."""
        return functools.reduce(getattr, self.qualname.split("."), _load_module(self.module, self.file))


def announce(text: str) -> None:
    """Within a run: tell the test process that this point has been reached (see :meth:`RankJob.wait_for`)."""
    assert _pipe is not None, "announce() is for functions that run on a pool's rank"
    _send(_pipe, ("said", text))


# ---- the test process's side of a rank ---------------------------------------------------------------------------
class _Rank:
    def __init__(self, context: Any, index: int, world_size: int, log: Path, env: Mapping[str, str]) -> None:
        self.index, self._log, self._begun = index, log, 0
        log.touch()
        self.pipe, remote = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve,
            args=(index, world_size, remote, lifeline, str(log), dict(env)),
            name=f"rank {index}",
            daemon=True,
        )
        self.process.start()
        self.pid: int = self.process.pid
        remote.close()
        lifeline.close()

    def begin(self, message: Any) -> None:
        self._begun = self._log.stat().st_size
        self.send(message)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # a dead rank is noticed by those that wait for it
            _send(self.pipe, message)

    def receive(self, timeout: float = 0.0) -> Any:
        """The next message, or None if there is none or the rank has ended."""
        try:
            return pickle.loads(self.pipe.recv_bytes()) if self.pipe.poll(timeout) else None  # noqa: S301 - from our own child
        except (EOFError, OSError):
            return None

    def death(self) -> Outcome:
        self.process.join(5)
        code = self.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return Outcome(rank=self.index, error=f"died {how}", died=code)

    def where(self) -> str:
        """Ask a rank that does not answer where it is."""
        before = self._log.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.05)
            if self._log.stat().st_size > before:
                time.sleep(0.05)
                break
        return self._log.read_bytes()[before:].decode(errors="replace") or "(no answer: the process is stopped)"

    def output(self) -> str:
        return self._log.read_bytes()[self._begun :].decode(errors="replace") if self._log.exists() else ""

    def kill(self) -> None:
        """End the rank and what it has started. SIGKILL also ends a stopped process."""
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(self.pid, signal.SIGKILL)
        self.process.join(10)
        self.pipe.close()
        self._lifeline.close()


def _outcome(rank: int, message: Any) -> Outcome:
    _, value, error, exception = message
    if error is not None:
        return Outcome(rank=rank, error=error, exception=_unpickled(exception))
    return Outcome(rank=rank, value=pickle.loads(value))  # noqa: S301 - from our own child


def _unpickled(data: bytes | None) -> BaseException | None:
    try:
        return None if data is None else pickle.loads(data)  # noqa: S301 - from our own child
    except Exception:  # noqa: BLE001 - many exceptions do not survive pickling; their text does
        return None


# ---- the rank's side ----------------------------------------------------------------------------------------------
_pipe: multiprocessing.connection.Connection | None = None
_pipe_lock = threading.Lock()


def _serve(rank: int, world_size: int, pipe: Any, lifeline: Any, log: str, env: Mapping[str, str]) -> None:
    """A rank's main loop: one function after the other, until the test process ends."""
    global _pipe
    _pipe = pipe
    os.setsid()  # the test process handles Ctrl-C; and this rank's children can be ended with it
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(n, "wb", 0, closefd=False), write_through=True) for n in (1, 2)
    )
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # else every collection visits a million objects of the preloaded modules
    gc.enable()
    os.environ.update(RANK_ENV, **env)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_RUN_ID="lightrft-testing",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
    )
    clean = dict(os.environ)
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from the test process that started this one
        except EOFError:
            return
        if message[0] == "clean":
            _clean(clean)
            _send(pipe, ("cleaned",))
        else:
            _, reference, payload, port = message
            os.environ["MASTER_PORT"] = str(port)
            _send(pipe, _call(reference, payload))


def _call(reference: FunctionReference, payload: bytes) -> tuple[Any, ...]:
    """Run a function: ("done", pickled value, error text, pickled exception)."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        function = reference.resolve()
        args, kwargs = pickle.loads(payload)  # noqa: S301 - from the test process that started this one
        return ("done", pickle.dumps(_on_cpu(function(*args, **kwargs))), None, None)
    except BaseException as error:  # noqa: BLE001 - the test process must learn of any error
        try:
            pickled = pickle.dumps(error)
        except Exception:  # noqa: BLE001
            pickled = None
        return ("done", None, _describe(error), pickled)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _clean(env: Mapping[str, str]) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(env)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


def _end_with_parent(lifeline: Any) -> None:
    """The other end of this pipe is open only in the test process."""
    lifeline.poll(None)
    os.killpg(0, signal.SIGKILL)


def _send(pipe: Any, message: Any) -> None:
    with _pipe_lock:
        pipe.send_bytes(pickle.dumps(message))


def _on_cpu(value: Any) -> Any:
    """The same structure with its tensors copied to the CPU: a view would be pickled with its whole base."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on_cpu(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def _describe(error: BaseException) -> str:
    """A traceback, with the local variables where it was raised, which a plain assert does not show."""
    text = "".join(traceback.format_exception(error))
    frame = None
    for candidate, _ in traceback.walk_tb(error.__traceback__):
        if "site-packages" not in candidate.f_code.co_filename:
            frame = candidate
    if frame is None or not isinstance(error, AssertionError):
        return text
    shown = [f"  {name} = {_short(value)}" for name, value in frame.f_locals.items() if not name.startswith("__")]
    return text + "with\n" + "\n".join(shown)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - a repr that fails must not hide the error
        text = f"<{type(value).__name__}: {error}>"
    return text if len(text) <= SHOWN_LOCAL else text[:SHOWN_LOCAL] + " ..."


def _load_module(name: str, file: str) -> ModuleType:
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == file:
        return known
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        spec = None
    if spec is not None and spec.origin == file:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
