"""Ctrl-C and SIGTERM: finish the optimizer step, write a checkpoint, end."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class Interruption:
    """Turns the first SIGINT or SIGTERM into a flag that the trainer checks; the second ends the process at once.

    Use as a context manager around the training loop, in the main thread::

        with Interruption() as interruption:
            trainer.fit(...)
            if interruption.asked: ...
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            # A terminal sends SIGINT to the whole group, and the launcher forwards it too: one request, not two.
            if number == signal.SIGTERM:
                return
            os._exit(128 + number)
        self.asked = True
