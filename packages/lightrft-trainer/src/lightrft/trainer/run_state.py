"""The position of a run, as it is written into a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightrft.strategy.errors import CheckpointError

SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


@dataclass
class RunState:
    """What a resumed run needs besides weights, optimizers, schedulers and random states, as JSON values.

    :param step: rollout steps that are complete.
    :param training: the rollout of step ``step + 1`` is in the buffer and partly trained on.
    :param epoch: passes over the buffer that are complete. :param batch: optimizer steps of the next pass that are
        complete.
    :param optimizer_steps: of the whole run. :param skipped_steps: of them, those whose gradient was not finite.
    :param sums: figures of the optimizer steps of an unfinished rollout step so far.
    :param figures: figures of its rollout.
    :param evaluation: held-out accuracy and mean reward by step.
    """

    step: int = 0
    training: bool = False
    epoch: int = 0
    batch: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The inverse of :meth:`to_json`.

        :raises CheckpointError: an early development version wrote it.
        """
        if not all(isinstance(figures, dict) for figures in values.get("evaluation", {}).values()):
            raise CheckpointError(
                "the checkpoint is of a development version before 0.1.0, whose evaluations have no reward; convert "
                "its weights with `lightrft convert` and start a new run with --pretrain"
            )
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


@contextlib.contextmanager
def keeping_settings(optimizer: Optimizer | None, scheduler: Any) -> Iterator[None]:
    """Load a checkpoint within: its states come back, but learning rate, betas, epsilon and decay are those that the
    run was given now. A schedule goes on at its place; one that is no function of the step comes back as it was saved.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    asked = [{name: group[name] for name in SETTINGS if name in group} for group in groups]
    yield
    if scheduler is not None and not isinstance(scheduler, LambdaLR):
        return
    for group, given in zip(groups, asked, strict=True):
        group.update(given)
    if scheduler is not None:
        scheduler.base_lrs = [given["initial_lr"] for given in asked]
        for group, shape in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * shape(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]
