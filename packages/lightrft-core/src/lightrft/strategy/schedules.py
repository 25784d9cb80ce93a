"""Learning-rate schedules by transformers' names."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .config import StrategyConfig

MIN_LR_SHARE = 0.1
KNOWN: tuple[str, ...] = get_args(get_type_hints(StrategyConfig)["lr_scheduler"])


def make_scheduler(name: str, optimizer: Optimizer, max_steps: int, warmup_ratio: float) -> LRScheduler:
    """A schedule over ``max_steps`` optimizer steps, the first ``warmup_ratio`` of them warming up.

    "constant", "constant_with_warmup", "linear", "cosine" and "cosine_with_min_lr" (down to a tenth of the peak) need
    torch only; the others of :data:`KNOWN` are transformers'.

    :raises ValueError: no such schedule, or one of transformers' where that is not installed.
    """
    warmup = math.ceil(max_steps * warmup_ratio)

    def warm(step: int) -> float:
        return min(1.0, (step + 1) / (warmup + 1))

    def progress(step: int) -> float:
        return min(1.0, max(0.0, (step - warmup) / max(1, max_steps - warmup)))

    shapes = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": warm,
        "linear": lambda step: warm(step) * (1 - progress(step)),
        "cosine": lambda step: warm(step) * (1 + math.cos(math.pi * progress(step))) / 2,
        "cosine_with_min_lr": lambda step: (
            warm(step) * (MIN_LR_SHARE + (1 - MIN_LR_SHARE) * (1 + math.cos(math.pi * progress(step))) / 2)
        ),
    }
    if name in shapes:
        return LambdaLR(optimizer, shapes[name])
    if name not in KNOWN:
        raise ValueError(f"--lr_scheduler {name}: must be one of {', '.join(KNOWN)}")
    try:
        from transformers import get_scheduler
    except ImportError as error:
        raise ValueError(
            f"--lr_scheduler {name}: known without transformers are {', '.join(sorted(shapes))}"
        ) from error
    scheduler: Any = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max_steps)
    return scheduler
