"""reasoning-gym, importable without the C extension that only its zebra puzzles call."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

ZEBRA_SOLVER = "pycosat"


class _ZebraSolver(ModuleType):
    """Stands in for pycosat, which reasoning-gym imports whether or not it makes zebra puzzles; raises when used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(
            "its zebra puzzles need pycosat: pip install pycosat (it has no wheels and needs a C compiler)",
            name=ZEBRA_SOLVER,
        )


def import_reasoning_gym() -> ModuleType:
    """The reasoning_gym module. Without pycosat all its tasks work but zebra puzzles, which say what to install.

    :raises ModuleNotFoundError: reasoning-gym is not installed.
    """
    # A checkout must not need a compiler. Goes once reasoning-gym imports pycosat where it is used.
    if ZEBRA_SOLVER in sys.modules or importlib.util.find_spec(ZEBRA_SOLVER) is not None:
        return importlib.import_module("reasoning_gym")
    sys.modules[ZEBRA_SOLVER] = _ZebraSolver(ZEBRA_SOLVER)
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        del sys.modules[ZEBRA_SOLVER]  # reasoning-gym keeps it; nobody else should find it
