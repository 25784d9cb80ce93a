"""Parameter groups, optimizers bound by name, and the scale of fp16 losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    ndim: Callable[[nn.Parameter], int] = lambda parameter: parameter.ndim,
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, biases and norms (fewer than two axes) do not.

    :param ndim: axes of the whole parameter, for backends whose shards are flat.
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            groups[0 if ndim(parameter) >= 2 else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def rebind(optimizer: Optimizer, names: Mapping[int, str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Re-bind an optimizer that was built before sharding to the sharded parameters, in place.

    :param names: name by ``id`` of the parameter that the optimizer holds now.
    :param parameters: the parameters after sharding, by name.
    :raises ValueError: the optimizer holds a parameter of another model, or has already stepped.
    """
    if any(optimizer.state.values()):
        raise ValueError("prepare: this optimizer has already stepped; prepare it with its model before training")
    for group in optimizer.param_groups:
        try:
            group["params"] = [parameters[names[id(parameter)]] for parameter in group["params"]]
        except KeyError as error:
            raise ValueError(
                "prepare: the optimizer holds a parameter that is not the model's; give each model its own optimizer"
            ) from error


class LossScale:
    """Dynamic scale of fp16 losses: halved on overflow, doubled after ``interval`` good steps (arXiv:1710.03740)."""

    def __init__(self, *, enabled: bool, initial: float = 2.0**16, interval: int = 2000) -> None:
        self.value = initial if enabled else 1.0
        self.enabled, self.interval, self.good_steps = enabled, interval, 0

    def update(self, *, finite: bool) -> None:
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])


def move_optimizer(optimizer: Optimizer, device: torch.device, *, pin: bool) -> int:
    """Move every state tensor to ``device`` (into pinned host memory with ``pin``). Returns the bytes moved."""
    moved = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            # A 0-d step counter stays where the optimizer put it.
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.device != device:
                target = value.to(device, non_blocking=device.type != "cpu")
                state[key] = target.pin_memory() if pin and device.type == "cpu" else target
                moved += value.nbytes
    return moved
