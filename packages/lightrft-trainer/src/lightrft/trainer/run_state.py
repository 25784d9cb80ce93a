"""Where a run stands, and how it is written into a checkpoint and found again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """All that a resumed run needs beyond weights, optimizers, schedulers and random states, as JSON values.

    :param step: rollout steps that are complete.
    :param training: the rollout of step ``step + 1`` is in the buffer and partly trained on.
    :param epoch: passes over the buffer that are complete. :param batch: optimizer steps of the next pass that are
        complete.
    :param optimizer_steps: of the whole run. :param skipped_steps: of them, those whose gradient was not finite.
    :param sums: what the optimizer steps of an unfinished rollout step have measured so far.
    :param figures: what its rollout measured.
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
    stream: dict[str, int] = field(default_factory=dict)
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The inverse of :meth:`to_json`."""
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
