"""The program that :class:`~lightrft.rewards.math_worker.MathWorker` starts: math-verify within time and memory limits.

It is run by its path, so that it imports only math-verify. Each comparison is made in a fork: one that does not end is
killed without losing the import, which takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
from typing import IO

MEMORY_BYTES = 4 * 2**30


def compare(answer: str, reference: str) -> bool:
    """math-verify's verdict, without its own time limit; each text is read first as LaTeX, then as plain text."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        # Without a limit math-verify does not use SIGALRM: the process is ended from outside instead.
        return parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    gold, guess = read(reference), read(answer)
    return bool(gold and guess and verify(gold, guess, timeout_seconds=None))


def compare_in_fork(answer: str, reference: str, seconds: float) -> str:
    """``"equal"``, ``"unequal"``, ``"late"``, or ``"died"`` (out of memory, a crash of the algebra system)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        verdict = b"unequal"
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            if compare(answer, reference):
                verdict = b"equal"
        except MemoryError:
            verdict = b"died"
        except Exception:  # noqa: BLE001 - an expression that makes the algebra system fail is not a correct answer
            verdict = b"unequal"
        finally:
            os.write(writer, verdict)
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], seconds)
        return (os.read(reader, 16).decode() or "died") if ready else "late"
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Read lines ``[answer, reference, seconds]`` and write a verdict for each, until the input or the parent ends."""
    logging.disable(logging.WARNING)  # math-verify warns at each comparison that its own limit is off
    compare("1", "1")  # imports and builds the parsers once for all forks

    print("ready", file=answers, flush=True)
    for line in questions:
        answer, reference, seconds = json.loads(line)
        print(compare_in_fork(answer, reference, seconds), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C and closes our input
    serve(sys.stdin, sys.stdout)
