"""What a process grows by."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psutil


def resident_rise(run: Callable[[], Any]) -> int:
    """Bytes by which this process grows, at the most, while ``run`` runs."""
    process, ended, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return max(0, peak - before)
