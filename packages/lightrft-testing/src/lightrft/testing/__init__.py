"""Test suites for strategies and engines to subclass, ranks to run them on, and faults to inject.

Names load on first use: pytest imports this package at its start, and torch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.strategy.fake_strategy import FakeStrategy

    from .engine_suite import EngineSuite
    from .fake_engine import FakeEngine
    from .faults import calling_first, cut, die, faulty_sync, flip_bit, poison_gradient
    from .launching import NodeResult, free_port, torchrun
    from .ranks import Outcome, RankFailure, RankJob, RankPool, announce
    from .strategy_suite import StrategySuite, on_ranks
    from .tiny_models import save_tiny_model, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
    from .trajectory import (
        RECIPES,
        Deviation,
        Recipe,
        Trajectory,
        compare,
        deviation_table,
        noise_floor,
        reference_trajectory,
        run_trajectory,
    )

_HOMES = {
    "lightrft.strategy.fake_strategy": ["FakeStrategy"],
    "lightrft.testing.engine_suite": ["EngineSuite"],
    "lightrft.testing.fake_engine": ["FakeEngine"],
    "lightrft.testing.faults": ["calling_first", "cut", "die", "faulty_sync", "flip_bit", "poison_gradient"],
    "lightrft.testing.launching": ["NodeResult", "free_port", "torchrun"],
    "lightrft.testing.ranks": ["Outcome", "RankFailure", "RankJob", "RankPool", "announce"],
    "lightrft.testing.strategy_suite": ["StrategySuite", "on_ranks"],
    "lightrft.testing.tiny_models": [
        "save_tiny_model",
        "tiny_image",
        "tiny_model",
        "tiny_processor",
        "tiny_tokenizer",
    ],
    "lightrft.testing.trajectory": [
        "RECIPES",
        "Deviation",
        "Recipe",
        "Trajectory",
        "compare",
        "deviation_table",
        "noise_floor",
        "reference_trajectory",
        "run_trajectory",
    ],
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Deviation",
    "EngineSuite",
    "FakeEngine",
    "FakeStrategy",
    "NodeResult",
    "Outcome",
    "RankFailure",
    "RankJob",
    "RECIPES",
    "RankPool",
    "Recipe",
    "StrategySuite",
    "Trajectory",
    "announce",
    "calling_first",
    "compare",
    "cut",
    "deviation_table",
    "die",
    "faulty_sync",
    "flip_bit",
    "free_port",
    "noise_floor",
    "on_ranks",
    "poison_gradient",
    "reference_trajectory",
    "run_trajectory",
    "save_tiny_model",
    "tiny_image",
    "tiny_model",
    "tiny_processor",
    "tiny_tokenizer",
    "torchrun",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
