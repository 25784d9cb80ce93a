"""math-verify in its own process, with a time limit that really ends a comparison.

math-verify's own limit uses SIGALRM, which works only in a program's main thread and does not interrupt compiled code.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pathlib
import queue
import subprocess
import sys
import threading
from typing import IO

from .deadline import seconds_left

logger = logging.getLogger(__name__)

HELPER = pathlib.Path(__file__).with_name("math_helper.py")
START_SECONDS = 120.0
COMPARE_SECONDS = 5.0
"""Limit of one comparison."""
LEAST_SECONDS = 0.1
BATCH_SHARE = 0.75
"""Of a batch's time, so much is for comparisons; the rest is kept for what else must be done by then."""


class MathWorker:
    """Compares expressions in a helper process, which starts with the first comparison and ends with this process.

    Within a reward's deadline a comparison takes at most half of the batch's remaining time, so that slow ones never
    use it up; if hardly any is left, a comparison is skipped and counts as unequal (``left_out``).

    :param compare_seconds: limit of one comparison; one that takes longer counts as unequal and is logged.
    :param start_seconds: limit of the helper's start (it imports sympy).
    """

    def __init__(self, *, compare_seconds: float = COMPARE_SECONDS, start_seconds: float = START_SECONDS) -> None:
        self.compare_seconds = compare_seconds
        self.start_seconds = start_seconds
        self.left_out = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        self._answers: queue.Queue[str] = queue.Queue()
        atexit.register(self.close)

    def equal(self, answer: str, reference: str) -> bool:
        """Whether math-verify finds ``answer`` equal to ``reference``.

        :raises RuntimeError: the helper cannot be started, or ended and does not start again.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
                self._start()
            limit = min(self.compare_seconds, seconds_left(BATCH_SHARE) / 2)
            if limit < min(LEAST_SECONDS, self.compare_seconds):
                self.left_out += 1
                return False
            assert self._process is not None and self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps([answer, reference, limit]) + "\n")
                self._process.stdin.flush()
                # The helper applies the limit; ours is only for a helper that is stuck itself.
                verdict = self._answers.get(timeout=limit + 30.0).strip()
            except (queue.Empty, OSError):
                verdict = ""
            if not verdict:
                self._stop()
        if verdict in ("equal", "unequal"):
            return verdict == "equal"
        reason = f"took longer than {limit:.3g} s" if verdict == "late" else "ended the comparing process"
        logger.warning("comparing %.80r with %.80r %s; it counts as unequal", answer, reference, reason)
        return False

    def close(self) -> None:
        """End the helper; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(HELPER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        self._answers = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        try:
            ready = self._answers.get(timeout=self.start_seconds)
        except queue.Empty:
            ready = ""
        if not ready:
            self._stop()
            raise RuntimeError(
                f"the math-verify helper ({sys.executable} -P {HELPER}) was not ready within {self.start_seconds:g} s; "
                "try `python -c 'import math_verify'`"
            )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a forked process must not end its parent's helper
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                logger.debug("the helper was gone before its pipe was closed")


def _pump(stream: IO[str], answers: queue.Queue[str]) -> None:
    """Move lines from the helper to the queue; an empty string says that it ended."""
    try:
        for line in stream:
            answers.put(line)
    except ValueError:  # the stream was closed under us by _stop
        logger.debug("the helper's output was closed")
    answers.put("")
