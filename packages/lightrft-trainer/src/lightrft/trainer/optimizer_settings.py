"""What an optimizer was made with, held over a checkpoint: a resumed run obeys the settings that it is given now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SETTINGS = ("betas", "eps", "weight_decay")


@contextlib.contextmanager
def keep_settings(optimizer: Optimizer, scheduler: Any) -> Iterator[None]:
    """A checkpoint that is read within it brings moments and the schedule's position, but no settings.

    Where these are the saved run's, nothing changes. A scheduler that is no LambdaLR (all of
    :mod:`lightrft.strategy.schedules` are) has its learning rate in its state, and goes on with that.
    """
    groups = optimizer.param_groups
    own = [{name: group[name] for name in SETTINGS if name in group} for group in groups]
    peaks = [group.get("initial_lr", group["lr"]) for group in groups]
    yield
    for group, settings in zip(groups, own, strict=True):
        group.update(settings)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = peaks
        rates = [peak * shape(scheduler.last_epoch) for peak, shape in zip(peaks, scheduler.lr_lambdas, strict=True)]
        for group, peak, rate in zip(groups, peaks, rates, strict=True):
            group.update(initial_lr=peak, lr=rate)
        scheduler._last_lr = rates
    elif scheduler is None:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak
