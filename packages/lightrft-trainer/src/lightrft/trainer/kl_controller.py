"""The weight of the KL penalty: fixed, or adapted to a target."""

from __future__ import annotations

import math
from typing import Any


class FixedKLController:
    """A constant weight."""

    def __init__(self, kl_coef: float) -> None:
        self.value = float(kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Ignore a measured KL."""

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: a fixed weight is the one that this run was given."""


class AdaptiveKLController(FixedKLController):
    """Raises the weight while the KL is above its target and lowers it below (arXiv:1909.08593, section 2.2).

    The paper multiplies by 1 + x; here it is exp(x), which is above 0 also where a step has many samples.

    :param init_kl_coef: the weight to begin with.
    :param target: the KL to hold, in nats a token.
    :param horizon: samples over which the weight may change by a factor of about 1.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: int) -> None:
        super().__init__(init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Adapt to the KL measured over ``n_steps`` samples. A KL that is not finite changes nothing."""
        if not math.isfinite(current):
            return
        error = min(max(current / self.target - 1.0, -0.2), 0.2)
        self.value *= math.exp(error * n_steps / self.horizon)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved weight."""
        self.value = float(state["value"])


def make_kl_controller(init_kl_coef: float, target: float | None, horizon: int) -> FixedKLController:
    """Adaptive if there is a target, else fixed."""
    return FixedKLController(init_kl_coef) if target is None else AdaptiveKLController(init_kl_coef, target, horizon)
