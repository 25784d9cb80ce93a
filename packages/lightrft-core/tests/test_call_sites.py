from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable

import pytest

from lightrft.strategy.call_sites import stands_at


@pytest.fixture
def in_a_thread() -> Callable[[Callable[[], object]], threading.Thread]:
    def start(work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    return start


def test_a_thread_is_at_a_line_and_was_called_from_another(
    in_a_thread: Callable[[Callable[[], object]], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Frame objects of other threads crash Python 3.11 now and then.
    monkeypatch.setattr(sys, "_current_frames", None)
    there, free = threading.Event(), threading.Event()

    def waits() -> None:
        there.set()
        free.wait()

    thread = in_a_thread(waits)
    assert there.wait(10) and thread.ident is not None
    line = waits.__code__.co_firstlineno + 2
    for _ in range(100):  # until it has got there
        found = stands_at(thread.ident)
        if re.fullmatch(rf".*/threading\.py:\d+ \(wait\), from {re.escape(__file__)}:{line}", found):
            break
    else:
        raise AssertionError(found)
    free.set()
    thread.join()
    assert stands_at(thread.ident) == "its end"
