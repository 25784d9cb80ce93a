"""The weight of the KL penalty: fixed, or steered toward a target."""

from __future__ import annotations

from typing import Any


class FixedKLController:
    """Always the same weight."""

    def __init__(self, kl_coef: float) -> None:
        self.value = float(kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Take note of a measured KL; changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.value = float(state["value"])


class AdaptiveKLController(FixedKLController):
    """Raises the weight while the KL is above its target and lowers it below (arXiv:1909.08593, section 2.2).

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
        if current != current or current in (float("inf"), float("-inf")):
            return
        error = min(max(current / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon


def make_kl_controller(init_kl_coef: float, target: float | None, horizon: int) -> FixedKLController:
    """Adaptive where there is a target, else fixed."""
    return FixedKLController(init_kl_coef) if target is None else AdaptiveKLController(init_kl_coef, target, horizon)
