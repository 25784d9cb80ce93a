"""Each rank notes what it does, so that a failed wait can name the rank at fault.

The timeout of a process group names no rank. So each rank keeps a journal in the launcher's key-value store:

- ``op``: sequence number, name and call site of each operation that waits for others, posted as it is entered;
- ``beat``: a heartbeat, posted by a thread: the number of collectives that the main thread has started in each process
  group and, once another rank asks, the line that it is at. A killed or stopped process posts no more;
- ``left``: how the rank left: the exception that passed through an operation or ended it, or its end.

When a wait fails, the others' journals say who raised, who is silent, who is behind, and where.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .blame import SHOWN_MESSAGE, Beat, Entry, RankNotes, blame, describe, is_lost_peer, parse_notes
from .call_sites import call_site, origin, stands_at
from .errors import RankTimeoutError
from .file_progress import pieces_done
from .group_waits import GroupDeadline, collectives_started, default_patience

SHOWN_RANKS = 8
_KINDS = ("op", "beat", "left")
_ALL, _SILENT = "all", "a rank became silent"
_ASKED = "asked"  # how often a rank has asked where the others' main threads are


@dataclass(kw_only=True)
class _Self:
    """This rank's state in one process group, shared by all its journals and the heartbeat's thread."""

    rank: int
    store: dist.Store
    interval: float
    deadline: GroupDeadline
    thread: int = field(default_factory=threading.get_ident)
    sequence: int = 0
    agreements: int = 0
    stack: list[Entry] = field(default_factory=list)
    since: float = 0.0
    told: str = ""
    left_in: int = -1
    stop: threading.Event = field(default_factory=threading.Event)

    def post_departure(self, how: str, text: str) -> None:
        """Tell the others how this rank leaves. Never raises, since it is called while the rank ends."""
        if how == "ended" and self.left_in == self.sequence:
            return  # the reason has been told already
        self.left_in = self.sequence
        with contextlib.suppress(RuntimeError):  # the store's host has ended
            self.store.set(f"left/{self.rank}", json.dumps([how, self.sequence, text]))


class RankJournal:
    """Posts this rank's operations and reads the others'. Without other ranks it does nothing.

    Strategies of one process group share one journal: their operations are counted together.

    :param timeout: seconds after which a wait ends. The last ones are spent on finding the rank at fault.
    :param ends_process: no exception ends a wait on this device (NCCL): at the deadline the journal writes the error
        and ends the process.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, *, ends_process: bool = False) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.interval = min(2.0, max(0.1, timeout / 20))
        # Long enough for a heartbeat of a living rank, even on a busy machine.
        self.patience = min(2 * self.interval + 1.0, timeout / 4)
        self._self: _Self | None = None
        if world_size == 1:
            return
        # Where the journal ends the process, torch's own watchdog must not be first: it names no rank.
        group_timeout = 1.5 * timeout + self.patience if ends_process else self.wait_seconds
        world = dist.distributed_c10d._get_default_group()
        mine = self._self = _selves.get(world)
        if mine is None:
            mine = self._self = _selves[world] = _Self(
                rank=rank, store=_connect(), interval=self.interval, deadline=GroupDeadline(group_timeout)
            )
            mine.store.set(f"left/{rank}", "")
            self._post(Entry(sequence=0, name="setup_distributed", site=call_site()))
            _watch_the_end()
            heart = threading.Thread(target=_beat_on, args=(mine, _connect()), daemon=True, name="lightrft-heart")
            heart.start()
        mine.interval, mine.deadline = self.interval, GroupDeadline(group_timeout)
        mine.deadline.impose()
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
        assert self._self is not None, "a single rank has no others"
        return self._self.store

    @property
    def wait_seconds(self) -> float:
        """How long a collective may wait: the deadline minus the time to find the rank at fault."""
        return self.timeout - self.patience

    # ---- operations --------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Wraps an operation that waits for the other ranks.

        :raises RankTimeoutError: the wait failed; names the ranks at fault, their operation and their line.
        """
        mine = self._self
        if mine is None:
            yield
            return
        mine.sequence += 1
        mine.told = ""
        entry = Entry(sequence=mine.sequence, name=name, site=call_site())
        self._post(entry)
        mine.stack.append(entry)
        patience = default_patience(timedelta(seconds=mine.deadline.seconds))
        begun = mine.since = time.monotonic()
        try:
            yield
        except BaseException as error:
            if not is_lost_peer(error):
                self._tell(error, entry)
                raise
            explained = RankTimeoutError(self.explain(entry, time.monotonic() - begun))
            self._tell(explained, entry)
            raise explained from error
        finally:
            default_patience(*patience)
            mine.stack.pop()
            mine.since = time.monotonic()

    def _post(self, entry: Entry) -> None:
        assert self._self is not None
        self._self.store.set(f"op/{self.rank}", f"{entry.sequence}\t{entry.name}\t{entry.site}")
        self._self.deadline.impose()

    def _tell(self, error: BaseException, entry: Entry) -> None:
        """Tell the others that an exception passes through an operation; only the innermost operation does."""
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
        """Tell the others whether this rank succeeded, and learn whether all did. It uses the store, so that a rank
        that failed in the middle of a collective can take part.

        :param problem: what went wrong here; this rank then does not wait.
        :return: the first problem of any rank, with its rank; None if all succeeded.
        :raises RuntimeError: a rank did not answer in time.
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
        """Wait for a key and watch the next rank: no connection breaks here when it becomes silent.

        It polls at intervals of a twentieth of the time waited so far: torch logs each wait that times out.
        """
        neighbour, number = (self.rank + 1) % self.world_size, -1
        began = looked = changed = time.monotonic()
        while not store.check([key]):
            now = time.monotonic()
            if now - began > self.wait_seconds:
                raise RuntimeError(f"timeout: the other ranks did not answer within {self.wait_seconds:g} s")
            if now - looked > self.interval:
                looked, notes = now, self._notes(neighbour, store)
                if notes.beat is not None and notes.beat.number != number:
                    number, changed = notes.beat.number, now
                ended = notes.departure is not None and notes.departure.how == "ended"
                # Longer than `patience`: here silence alone decides, and a rank that loads is silent too.
                if ended or now - changed > 8 * self.interval + 1.0:
                    store.compare_set(key, "", _SILENT)
            time.sleep(min(0.2, max(0.0002, 0.05 * (now - began))))

    def all_have_agreed(self, seconds: float) -> bool:
        """Whether every rank has left the latest agreement. Waits so long for them."""
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
        """What the other ranks have posted. :raises RuntimeError: the store's host has ended."""
        store = store or self._store
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        keys = [f"{kind}/{rank}" for rank in others for kind in _KINDS]
        if not store.check(keys):  # some have not joined yet
            return {rank: self._notes(rank, store) for rank in others}
        values = [value.decode() for value in store.multi_get(keys)]
        return {rank: parse_notes(*values[i * len(_KINDS) :][: len(_KINDS)]) for i, rank in enumerate(others)}

    def _notes(self, rank: int, store: dist.Store) -> RankNotes:
        return parse_notes(
            *(store.get(key).decode() if store.check([key]) else "" for key in (f"{kind}/{rank}" for kind in _KINDS))
        )

    def explain(self, entry: Entry, waited: float, store: dist.Store | None = None) -> str:
        """Why a wait failed: reads the others' journals for up to ``patience`` seconds."""
        try:
            question = (store or self._store).add(_ASKED, 1)
            before = self.notes(store)
            after, until = before, time.monotonic() + self.patience
            while time.monotonic() < until:
                time.sleep(self.patience / 5)
                after = self.notes(store)
                if all(now.beat is not None and now.beat.answered >= question for now in after.values()):
                    break
            causes = blame(entry.sequence, collectives_started(), before, after)
        except RuntimeError as error:
            causes = [f"the process that hosts the key-value store (the launcher, or rank 0) is gone: {error}"]
        more = f"; and {len(causes) - SHOWN_RANKS} more ranks" if len(causes) > SHOWN_RANKS else ""
        return (
            f"{entry} on rank {self.rank} failed after {waited:.1f} s (deadline {self.timeout:g} s, --dist_timeout). "
            f"Cause: {'; '.join(causes[:SHOWN_RANKS])}{more}"
        )


# ---- threads ---------------------------------------------------------------------------------------------------------
def _connect() -> dist.Store:
    """A separate connection: a wait blocks the one that it uses."""
    shared: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("lightrft.journal", shared.clone())
    store.set_timeout(timedelta(seconds=5))
    return store


def _beat_on(mine: _Self, store: dist.Store) -> None:
    """The thread that posts heartbeats as long as this process group exists.

    It looks at the main thread only when it is asked, since some versions of Python cannot bear that for ever.
    """
    number, at = 0, ""
    with contextlib.suppress(RuntimeError):  # the store is gone: no one can read them
        answered = store.add(_ASKED, 0)
        while _is_current(mine):
            if (asked := store.add(_ASKED, 0)) != answered:
                at, answered = stands_at(mine.thread), asked
            beat = Beat(number=number, wall=time.time(), started=collectives_started(), answered=answered, at=at)
            store.set(f"beat/{mine.rank}", json.dumps(vars(beat)))
            mine.deadline.impose()
            number += 1
            if mine.stop.wait(mine.interval):
                return


def _end_waits(journal: RankJournal, mine: _Self, store: dist.Store) -> None:
    """The thread that ends this process with the error if an operation has made no progress in time."""
    progress, since = (-1, -1), time.monotonic()
    while _is_current(mine) and not mine.stop.wait(journal.interval / 2):
        if (now := (sum(collectives_started().values()), pieces_done())) != progress:
            progress, since = now, time.monotonic()
        stack, waited = list(mine.stack), time.monotonic() - max(since, mine.since)
        if stack and waited >= journal.wait_seconds:
            _end_process(mine, journal.explain(stack[-1], waited, store))


def _end_process(mine: _Self, text: str) -> None:
    sys.stderr.write(f"lightrft: {text}\n")
    sys.stderr.flush()
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": stands_at(mine.thread), "timestamp": str(int(time.time())), "secondary": True}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    os._exit(1)


def _is_current(mine: _Self) -> bool:
    world = dist.group.WORLD
    return world is not None and _selves.get(world) is mine


# ---- the end of the process ------------------------------------------------------------------------------------------
_selves: weakref.WeakKeyDictionary[dist.ProcessGroup, _Self] = weakref.WeakKeyDictionary()
_watching: list[bool] = []


def note_departure(error: BaseException | None) -> None:
    """Tell the other ranks that this one ends, and why (None: normally). Never raises."""
    for mine in list(_selves.values()):
        if error is None:
            mine.post_departure("ended", "")
        elif isinstance(error, RankTimeoutError):
            mine.post_departure("gave up", "gave up waiting")
        elif describe(error) != mine.told:  # else the operation has told them
            mine.post_departure("raised", f"{describe(error)}, at {origin(error)}")


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
    """Stop the heartbeats before the interpreter ends."""
    note_departure(None)
    for mine in list(_selves.values()):
        mine.stop.set()
