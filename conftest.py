"""What every package's tests share: one thread a process, and property tests without a clock or a die."""

from __future__ import annotations

import gc
import importlib.util
import os

# Tiny tensors gain nothing from threads, and lose a factor of ten where several ranks or suites share the cores. Read
# when torch is first imported, which is after this; the ranks that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("lightrft", deadline=None, derandomize=True, database=None, print_blob=True)
    settings.load_profile("lightrft")

# Collecting tests imports torch and transformers, a million objects that stay: looking for garbage among them takes a
# seventh of the time, and later the same at every full collection.
gc.disable()


def pytest_collection_finish() -> None:
    """Tests begin with the garbage collector as it was, and what was imported out of its sight."""
    gc.freeze()
    gc.enable()
