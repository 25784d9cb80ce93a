"""Which rank is at fault when a wait fails: pure functions of the ranks' journals."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch.distributed as dist

from .errors import LightRFTError

SHOWN_MESSAGE = 500


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
    """A heartbeat.

    :param number: counts them. :param wall: when, in seconds of the epoch.
    :param started: collectives started, by process group.
    :param answered: number of the last question where the main thread is.
    :param at: the answer; empty before the first question.
    """

    number: int
    wall: float
    started: dict[str, int]
    answered: int
    at: str


@dataclass(frozen=True, kw_only=True)
class Departure:
    """How a rank left. ``how``: "raised", "gave up" (it waited for another one), or "ended"."""

    how: str
    sequence: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RankNotes:
    """What the journals have of one rank."""

    entry: Entry | None = None
    beat: Beat | None = None
    departure: Departure | None = None


def parse_notes(entry: str, beat: str, left: str) -> RankNotes:
    """Parse what a rank has posted; an empty string means that it has not posted yet."""
    sequence, name, site = entry.split("\t") if entry else ("0", "", "")
    return RankNotes(
        entry=Entry(sequence=int(sequence), name=name, site=site) if entry else None,
        beat=Beat(**json.loads(beat)) if beat else None,
        departure=Departure(**dict(zip(("how", "sequence", "text"), json.loads(left), strict=True))) if left else None,
    )


def blame(
    sequence: int, started: dict[str, int], before: dict[int, RankNotes], after: dict[int, RankNotes]
) -> list[str]:
    """The ranks at fault for a failed wait, in a phrase each; the surest evidence comes first.

    :param sequence: number of the operation that waited. :param started: collectives that this rank has started, by
        group.
    :param before: the others' notes; ``after``: the same later, when each living rank should have sent a heartbeat.
    """
    wall = time.time()
    gone, behind, slow, gave_up, alive = [], [], [], [], []
    for rank, now in after.items():
        number = -1 if now.entry is None else now.entry.sequence
        place = f"rank {rank}, " + ("before it joined" if now.entry is None else f"last seen in {now.entry}")
        at = f", now at {now.beat.at}" if now.beat and now.beat.at else ""
        lag = sum(max(0, n - now.beat.started.get(group, 0)) for group, n in started.items()) if now.beat else 0
        left = now.departure
        if left is not None and left.how != "ended" and left.sequence < number:
            left = None  # the error was caught, and the rank continued
        if left is not None and left.how == "raised":
            gone.append(f"rank {rank} raised {left.text}")
        elif left is not None and left.how == "gave up":
            gave_up.append(f"rank {rank} {left.text}")
        elif left is not None:
            gone.append(f"{place}, has ended")
        elif not has_beaten(before[rank], now):
            silent = f" for {max(0.0, wall - now.beat.wall):.1f} s" if now.beat is not None else ""
            gone.append(f"{place}, is silent{silent} (killed, stopped or cut off)")
        elif number < sequence:
            behind.append(f"{place}{at}")
        elif number == sequence and lag:
            slow.append(f"{place}, is {lag} collective{'s' if lag > 1 else ''} behind{at}")
        else:
            alive.append(f"{place}{at}")
    return gone or behind or slow or gave_up or ["unknown, all other ranks are alive", *alive]


def has_beaten(before: RankNotes, after: RankNotes) -> bool:
    """Whether a rank has sent a heartbeat between two readings of its notes."""
    return after.beat is not None and (before.beat is None or after.beat.number != before.beat.number)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error comes from waiting for a rank and not from the work itself.

    torch raises a RuntimeError that says so in words. Our own errors may contain such words too, in a flag's name such
    as --engine_timeout.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, LightRFTError):
        return False
    text = str(error).lower()
    signs = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe")
    return isinstance(error, dist.DistBackendError) or any(sign in text for sign in signs)


def describe(error: BaseException) -> str:
    """An exception's type and message, cut to a readable length."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= SHOWN_MESSAGE else text[:SHOWN_MESSAGE] + " ..."
