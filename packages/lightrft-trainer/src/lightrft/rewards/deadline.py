"""Call a function with a deadline, and report where it was stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lightrft.strategy.call_sites import stands_at

Result = TypeVar("Result")

_call = threading.local()


class LateCallError(Exception):
    """The call is still running after its deadline. ``where`` is the line that it was executing."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


def seconds_left(share: float = 1.0) -> float:
    """Seconds until ``share`` of this thread's time from :func:`call_with_deadline` is over; infinite elsewhere."""
    return _call.begun + share * _call.seconds - time.monotonic() if hasattr(_call, "begun") else float("inf")


def call_with_deadline(function: Callable[[], Result], seconds: float) -> Result:
    """Run ``function`` in its own thread and return its result, or raise its error.

    A thread cannot be ended from outside: a late call continues in a daemon thread, which does not keep the program
    alive.

    :raises LateCallError: it did not return within ``seconds``.
    """
    outcome: dict[str, Any] = {}

    def target() -> None:
        _call.begun, _call.seconds = time.monotonic(), seconds
        try:
            outcome["result"] = function()
        except BaseException as error:  # noqa: BLE001 - any error is raised in the caller below
            outcome["error"] = error

    thread = threading.Thread(target=target, name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise LateCallError(stands_at(thread.ident or -1))
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
