"""Progress on rank 0: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SHOWN = (
    ("reward_mean", "reward", ".3f"),
    ("response_length_mean", "length", ".1f"),
    ("tokens_per_second", "tok/s", ".0f"),
)
HELD_OUT = (("eval_accuracy", "accuracy", ".3f"), ("eval_reward", "reward", ".3f"))
PLAIN_SECONDS = 5.0


class Progress(Protocol):
    """Shows the progress of a run."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *exception: object) -> None: ...

    def advance(self, step: int, values: Mapping[str, Any]) -> None:
        """A step is done."""

    def note(self, text: str) -> None:
        """Show a line without disturbing the bar."""


class SilentProgress:
    """For the other ranks."""

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def advance(self, step: int, values: Mapping[str, Any]) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


class PlainProgress:
    """A line every few seconds, for logs and pipes; the first and the last step always get one."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._last = 0.0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def advance(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line if the last one is old enough."""
        now = time.monotonic()
        if self._last == 0.0 or step >= self.total or now - self._last >= PLAIN_SECONDS:
            self._last = now
            self.note(f"step {step}/{self.total}  {describe(values)}")

    def note(self, text: str) -> None:
        """Write the line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


class LiveProgress:
    """rich's bar."""

    def __init__(self, total: int, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, step: int, values: Mapping[str, Any]) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, figures=describe(values))

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)


def describe(values: Mapping[str, Any], shown: Sequence[tuple[str, str, str]] = SHOWN) -> str:
    """The figures that fit next to a bar."""
    return "  ".join(f"{label} {values[name]:{form}}" for name, label, form in shown if values.get(name) is not None)


def make_progress(total: int, *, done: int = 0, show: bool = True) -> Progress:
    """A bar on a terminal, lines elsewhere, nothing if ``show`` is off."""
    if not show:
        return SilentProgress()
    return LiveProgress(total, done) if sys.stdout.isatty() else PlainProgress(total)
