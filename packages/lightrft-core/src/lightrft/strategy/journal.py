"""Who is late, with what: every rank notes what it does, so that a failed wait can name the culprit.

A process-group timeout names no rank. Each rank therefore keeps a journal in the launcher's key-value store:

- ``op``: sequence number, name and call site of each operation that waits for others, posted as it is entered;
- ``beat``: posted by a thread at intervals: that the process lives, where its main thread stands, and how many
  collectives it has started in each process group. A killed or stopped process beats no more;
- ``left``: how it left: the exception that passed through an operation or ended it, or its end.

When a wait fails, the others' journals say who raised, who is silent, who is behind, and where.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn

from .errors import RankTimeoutError

_PACKAGE = str(Path(__file__).parent)
_LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
SHOWN_MESSAGE, SHOWN_RANKS = 500, 8
_KINDS = ("op", "beat", "left")
_ALL, _SILENT = "all", "a rank fell silent"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An operation that a rank has entered."""

    sequence: int
    name: str
    site: str

    def __str__(self) -> str:
        return f"{self.name} (number {self.sequence}) at {self.site}"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life.

    :param number: counts them. :param wall: when, in seconds of the epoch. :param at: where the main thread stands.
    :param started: collectives started, by process group.
    """

    number: int
    wall: float
    at: str
    started: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Departure:
    """How a rank left. ``how``: "raised", "gave up" (it waited for another one), or "ended"."""

    how: str
    sequence: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RankNotes:
    """All that a journal holds of one rank."""

    entry: Entry | None = None
    beat: Beat | None = None
    departure: Departure | None = None


@dataclass(kw_only=True)
class _Self:
    """What this rank is about in one world, shared by all journals and the heart."""

    rank: int
    store: dist.Store
    interval: float
    group_timeout: float
    thread: int = field(default_factory=threading.get_ident)
    sequence: int = 0
    agreements: int = 0
    stack: list[Entry] = field(default_factory=list)
    since: float = 0.0
    told: str = ""
    left_in: int = -1
    bounded: tuple[int, int] = (0, 0)
    stop: threading.Event = field(default_factory=threading.Event)

    def post_departure(self, how: str, text: str) -> None:
        """Tell the others how this rank leaves. Never raises: it is called on the way out."""
        if how == "ended" and self.left_in == self.sequence:
            return  # the reason is told already
        self.left_in = self.sequence
        with contextlib.suppress(RuntimeError):  # the store died with its host
            self.store.set(f"left/{self.rank}", json.dumps([how, self.sequence, text]))


class RankJournal:
    """Posts this rank's operations and reads the others'. Without other ranks it does nothing.

    Journals of one process group are one: several strategies count their operations together.

    :param timeout: seconds after which a wait ends. The last of them are spent on finding out who is at fault.
    :param ends_process: no exception ends a wait of this device (NCCL): at the deadline the journal writes the error
        and ends the process.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, *, ends_process: bool = False) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.interval = min(5.0, max(0.1, timeout / 20))
        # Long enough for a living rank to beat, on a busy machine too.
        self.patience = min(2 * self.interval + 1.0, timeout / 4)
        self._self: _Self | None = None
        if world_size == 1:
            return
        # Where the journal ends the process, torch's own watchdog must not come first: it names nobody.
        group_timeout = 1.5 * timeout + self.patience if ends_process else self.wait_seconds
        world = dist.distributed_c10d._get_default_group()
        mine = self._self = _selves.get(world)
        if mine is None:
            mine = self._self = _selves[world] = _Self(
                rank=rank, store=_connect(), interval=self.interval, group_timeout=group_timeout
            )
            mine.store.set(f"left/{rank}", "")
            self._post(Entry(sequence=0, name="setup_distributed", site=_call_site()))
            _watch_the_end()
            heart = threading.Thread(target=_beat_on, args=(mine, _connect()), daemon=True, name="lightrft-heart")
            heart.start()
        mine.interval, mine.group_timeout, mine.bounded = self.interval, group_timeout, (0, 0)
        bound_waits(mine)
        if ends_process:
            watch = threading.Thread(
                target=_end_waits, args=(self, mine, _connect()), daemon=True, name="lightrft-watch"
            )
            watch.start()

    @property
    def sequence(self) -> int:
        """Operations entered so far."""
        return 0 if self._self is None else self._self.sequence

    @property
    def _store(self) -> dist.Store:
        assert self._self is not None, "a rank alone has no others"
        return self._self.store

    @property
    def wait_seconds(self) -> float:
        """How long a collective may wait: the deadline, less the time to find out who is at fault."""
        return self.timeout - self.patience

    # ---- operations --------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Everything within waits for the other ranks.

        :raises RankTimeoutError: the wait failed; names the ranks at fault, their operation and their line.
        """
        mine = self._self
        if mine is None:
            yield
            return
        mine.sequence += 1
        mine.told = ""
        entry = Entry(sequence=mine.sequence, name=name, site=_call_site())
        self._post(entry)
        mine.stack.append(entry)
        patience = _default_patience(timedelta(seconds=mine.group_timeout))
        begun = mine.since = time.monotonic()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RuntimeError) or not is_lost_peer(error):
                self._tell(error, entry)
                raise
            explained = RankTimeoutError(self.explain(entry, time.monotonic() - begun))
            self._tell(explained, entry)
            raise explained from error
        finally:
            _default_patience(*patience)
            mine.stack.pop()
            mine.since = time.monotonic()

    def _post(self, entry: Entry) -> None:
        assert self._self is not None
        self._self.store.set(f"op/{self.rank}", f"{entry.sequence}\t{entry.name}\t{entry.site}")
        bound_waits(self._self)

    def _tell(self, error: BaseException, entry: Entry) -> None:
        """Tell the others that an exception passes through an operation; the innermost one tells."""
        assert self._self is not None
        if describe(error) == self._self.told or isinstance(error, GeneratorExit):
            return
        self._self.told = describe(error)
        if isinstance(error, RankTimeoutError):
            self._self.post_departure("gave up", f"gave up waiting in {entry}")
        else:
            self._self.post_departure("raised", f"{describe(error)}, in {entry}")

    # ---- agreement ---------------------------------------------------------------------------------------------------
    def agree(self, problem: str | None) -> str | None:
        """Tell the others whether this rank succeeded, and hear whether all did; the store carries it, so that a rank
        that failed in the middle of a collective can tell.

        :param problem: what went wrong here; this rank then waits for nobody.
        :return: the first problem of any rank, with its rank; None where all succeeded.
        :raises RuntimeError: a rank did not come in time.
        """
        if self._self is None:
            return problem
        self._self.agreements += 1
        key, store = f"agree/{self._self.agreements}", self._self.store
        if problem is not None:
            store.compare_set(f"{key}/done", "", f"rank {self.rank}: {problem}"[: 8 * SHOWN_MESSAGE])
            store.add(f"{key}/count", 1)
            return f"rank {self.rank}: {problem}"
        if store.add(f"{key}/count", 1) == self.world_size:
            store.compare_set(f"{key}/done", "", _ALL)
            for part in ("done", "count"):  # of one that every rank has left
                store.delete_key(f"agree/{self._self.agreements - 2}/{part}")
        self._await(store, f"{key}/done")
        found = store.get(f"{key}/done").decode()
        if found == _SILENT:
            raise RuntimeError(f"timeout: {_SILENT}")
        return None if found == _ALL else found

    def _await(self, store: dist.Store, key: str) -> None:
        """Wait for a key, with an eye on the next rank: no connection breaks here when it falls silent."""
        deadline, neighbour = time.monotonic() + self.wait_seconds, (self.rank + 1) % self.world_size
        number, changed = -1, time.monotonic()
        while True:
            left = deadline - time.monotonic()
            try:
                return store.wait([key], timedelta(seconds=max(0.001, min(self.interval, left))))
            except RuntimeError as error:
                if left <= self.interval or "timeout" not in str(error).lower():
                    raise
            notes = self._notes(neighbour, store)
            if notes.beat is not None and notes.beat.number != number:
                number, changed = notes.beat.number, time.monotonic()
            ended = notes.departure is not None and notes.departure.how == "ended"
            if ended or time.monotonic() - changed > 3 * self.interval + 2.0:
                store.compare_set(key, "", _SILENT)

    def all_have_agreed(self, seconds: float) -> bool:
        """Has every rank left the latest agreement, with success or without? Waits for them, so long."""
        if self._self is None:
            return True
        until = time.monotonic() + seconds
        while self._self.store.add(f"agree/{self._self.agreements}/count", 0) < self.world_size:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    # ---- naming the culprit ------------------------------------------------------------------------------------------
    def notes(self, store: dist.Store | None = None) -> dict[int, RankNotes]:
        """What the other ranks have posted. :raises RuntimeError: the store died with its host."""
        store = store or self._store
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        keys = [f"{kind}/{rank}" for rank in others for kind in _KINDS]
        if not store.check(keys):  # some have not joined yet
            return {rank: self._notes(rank, store) for rank in others}
        values = [value.decode() for value in store.multi_get(keys)]
        return {rank: _parse(*values[i * len(_KINDS) :][: len(_KINDS)]) for i, rank in enumerate(others)}

    def _notes(self, rank: int, store: dist.Store) -> RankNotes:
        return _parse(
            *(store.get(key).decode() if store.check([key]) else "" for key in (f"{kind}/{rank}" for kind in _KINDS))
        )

    def explain(self, entry: Entry, waited: float, store: dist.Store | None = None) -> str:
        """Why a wait failed: looks at the others' journals for up to ``patience`` seconds."""
        try:
            before = self.notes(store)
            after, until = before, time.monotonic() + self.patience
            while time.monotonic() < until:
                time.sleep(self.patience / 5)
                after = self.notes(store)
                if all(_has_beaten(before[rank], after[rank]) for rank in after):
                    break
            causes = blame(entry.sequence, collectives_started(), before, after)
        except RuntimeError as error:
            causes = [f"the journal is gone, and with it the process that hosts it (the launcher, or rank 0): {error}"]
        more = f"; and {len(causes) - SHOWN_RANKS} more ranks" if len(causes) > SHOWN_RANKS else ""
        return (
            f"{entry} on rank {self.rank} failed after {waited:.1f} s (deadline {self.timeout:g} s, --dist_timeout). "
            f"Cause: {'; '.join(causes[:SHOWN_RANKS])}{more}"
        )


def _parse(entry: str, beat: str, left: str) -> RankNotes:
    sequence, name, site = entry.split("\t") if entry else ("0", "", "")
    return RankNotes(
        entry=Entry(sequence=int(sequence), name=name, site=site) if entry else None,
        beat=Beat(**json.loads(beat)) if beat else None,
        departure=Departure(**dict(zip(("how", "sequence", "text"), json.loads(left), strict=True))) if left else None,
    )


def blame(
    sequence: int, started: dict[str, int], before: dict[int, RankNotes], after: dict[int, RankNotes]
) -> list[str]:
    """The ranks at fault for a wait that failed, a phrase each; the surest signs come first.

    :param sequence: number of the operation that waited. :param started: collectives it has started, by group.
    :param before: the others' notes, and again, after each living rank should have beaten, ``after``.
    """
    wall = time.time()
    gone, behind, slow, gave_up, alive = [], [], [], [], []
    for rank, now in after.items():
        number = -1 if now.entry is None else now.entry.sequence
        place = f"rank {rank}, " + ("before it had joined" if now.entry is None else f"last seen in {now.entry}")
        at = "" if now.beat is None else f", now at {now.beat.at}"
        lag = sum(max(0, n - now.beat.started.get(group, 0)) for group, n in started.items()) if now.beat else 0
        left = now.departure
        if left is not None and left.how != "ended" and left.sequence < number:
            left = None  # it raised, somebody caught it, and it went on
        if left is not None and left.how == "raised":
            gone.append(f"rank {rank} raised {left.text}")
        elif left is not None and left.how == "gave up":
            gave_up.append(f"rank {rank} {left.text}")
        elif left is not None:
            gone.append(f"{place}, has ended")
        elif not _has_beaten(before[rank], now):
            silent = f" for {max(0.0, wall - now.beat.wall):.1f} s" if now.beat is not None else ""
            gone.append(f"{place}, is silent{silent} (killed, stopped or cut off){at.replace('now', 'then')}")
        elif number < sequence:
            behind.append(f"{place}{at}")
        elif number == sequence and lag:
            slow.append(f"{place}, is {lag} collective{'s' if lag > 1 else ''} behind{at}")
        else:
            alive.append(f"{place}{at}")
    return gone or behind or slow or gave_up or ["not known, all others are alive", *alive]


def _has_beaten(before: RankNotes, after: RankNotes) -> bool:
    return after.beat is not None and (before.beat is None or after.beat.number != before.beat.number)


# ---- threads ---------------------------------------------------------------------------------------------------------
def _connect() -> dist.Store:
    """A connection of its own: whoever waits on one blocks it."""
    shared: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("lightrft.journal", shared.clone())
    store.set_timeout(timedelta(seconds=5))
    return store


def _beat_on(mine: _Self, store: dist.Store) -> None:
    """The thread that posts signs of life, as long as this process group exists."""
    number = 0
    while _is_current(mine):
        beat = Beat(number=number, wall=time.time(), at=_stands_at(mine.thread), started=collectives_started())
        try:
            store.set(f"beat/{mine.rank}", json.dumps(vars(beat)))
            bound_waits(mine)
        except RuntimeError:  # the store is gone, and with it everybody who might read
            return
        number += 1
        if mine.stop.wait(mine.interval):
            return


def _end_waits(journal: RankJournal, mine: _Self, store: dist.Store) -> None:
    """The thread that ends this process with the named error, once an operation has made no progress in time."""
    progress, since = -1, time.monotonic()
    while _is_current(mine) and not mine.stop.wait(journal.interval / 2):
        if (started := sum(collectives_started().values())) != progress:
            progress, since = started, time.monotonic()
        stack, waited = list(mine.stack), time.monotonic() - max(since, mine.since)
        if stack and waited >= journal.wait_seconds:
            _end_process(mine, journal.explain(stack[-1], waited, store))


def _end_process(mine: _Self, text: str) -> None:
    sys.stderr.write(f"lightrft: {text}\n")
    sys.stderr.flush()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": _stands_at(mine.thread), "timestamp": str(int(time.time())), "secondary": True}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    os._exit(1)


def _is_current(mine: _Self) -> bool:
    world = dist.group.WORLD
    return world is not None and _selves.get(world) is mine


def bound_waits(mine: _Self) -> None:
    """Give every process group the deadline: libraries make groups of their own, with half an hour of patience."""
    groups = dist.distributed_c10d._world.pg_map
    newest = len(groups), id(next(reversed(groups), None))
    if newest == mine.bounded:
        return
    mine.bounded = newest
    for group in list(groups):
        if isinstance(group, dist.ProcessGroup):
            group.set_timeout(timedelta(seconds=mine.group_timeout))


def _default_patience(seconds: timedelta, nccl: timedelta | None = None) -> tuple[timedelta, Any]:
    """Set how long ranks wait for each other to make a group, where a library does not say; returns what was set.

    torch has no setting for it, and half an hour for gloo.
    """
    c10d: Any = dist.distributed_c10d
    before = c10d.default_pg_timeout, c10d.default_pg_nccl_timeout
    c10d.default_pg_timeout = seconds
    if before[1] is not None:  # None where torch has no NCCL
        c10d.default_pg_nccl_timeout = nccl or seconds
    return before


def collectives_started() -> dict[str, int]:
    """How many collectives this rank has started in each of its process groups."""
    started = {}
    groups = [group for group in list(dist.distributed_c10d._world.pg_map) if isinstance(group, dist.ProcessGroup)]
    for group in groups:
        counter: Any = group
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            started[group.group_name] = counter._get_sequence_number_for_group()
    return started


def _stands_at(thread: int) -> str:
    """The line that a thread is at, and the nearest one of neither Python nor an installed package."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    text, user = f"{_line(frame)} ({frame.f_code.co_name})", frame
    while user is not None and user.f_code.co_filename.startswith(_LIBRARIES):
        user = user.f_back
    return text if user is None or user is frame else f"{text}, from {_line(user)}"


# ---- the end of the process ------------------------------------------------------------------------------------------
_selves: weakref.WeakKeyDictionary[dist.ProcessGroup, _Self] = weakref.WeakKeyDictionary()
_watching: list[bool] = []


def note_departure(error: BaseException | None) -> None:
    """Tell the other ranks that this one ends, and why (None: it is done). Never raises."""
    for mine in list(_selves.values()):
        if error is None:
            mine.post_departure("ended", "")
        elif isinstance(error, RankTimeoutError):
            mine.post_departure("gave up", "gave up waiting")
        elif describe(error) != mine.told:  # else the operation has told
            mine.post_departure("raised", f"{describe(error)}, at {_origin(error)}")


def _watch_the_end() -> None:
    """From now on an uncaught exception, and the end of this process, are noted."""
    if _watching:
        return
    _watching.append(True)
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        note_departure(error)
        before(kind, error, trace)

    sys.excepthook = excepthook
    atexit.register(_end)


def _end() -> None:
    """Stop the hearts before the interpreter goes."""
    note_departure(None)
    for mine in list(_selves.values()):
        mine.stop.set()


# ---- parts -----------------------------------------------------------------------------------------------------------
def watch_calls(model: nn.Module, operation: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
    """Make each call of ``model`` an operation: a sharded model waits for other ranks while it computes.

    As in ``fully_shard`` the class is replaced by a subclass; a hook could not see what other hooks raise.

    :param operation: a bound method, which is not kept alive.
    """
    kind, reference = type(model), weakref.WeakMethod(operation)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        alive = reference()
        with alive("forward") if alive is not None else contextlib.nullcontext():
            return kind.__call__(self, *args, **kwargs)

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    watched = type(kind.__name__, (kind,), {**named, "__call__": __call__})
    model.__class__ = watched


def is_lost_peer(error: BaseException) -> bool:
    """Does the error come from waiting for a rank, and not from the work itself?"""
    text = str(error).lower()
    signs = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe")
    return isinstance(error, dist.DistBackendError) or any(sign in text for sign in signs)


def describe(error: BaseException) -> str:
    """An exception's type and message, cut to a readable length."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= SHOWN_MESSAGE else text[:SHOWN_MESSAGE] + " ..."


def _origin(error: BaseException) -> str:
    trace = error.__traceback__
    if trace is None:
        return "an unknown line"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _call_site() -> str:
    """The nearest line outside this package and contextlib: where the user called."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_filename == contextlib.__file__
    ):
        frame = frame.f_back
    return _line(frame)
