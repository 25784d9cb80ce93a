"""AdamW on this rank's rows, with torch's kernel and without a DTensor dispatch for each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import AdamW, adamw

from .shards import local


def supported_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of ``create_optimizer`` for :class:`ShardedAdamW`, without the choice of a kernel: it has its own.

    :raises TypeError: an option that it does not have; says what to do instead.
    """
    options = {name: value for name, value in given.items() if name not in ("fused", "foreach")}
    if unknown := sorted(options.keys() - {"lr", "betas", "eps"}):
        raise TypeError(
            f"create_optimizer: FSDP2's AdamW takes lr, betas, eps and weight_decay, not {', '.join(unknown)}; make "
            "another optimizer first, and prepare((model, optimizer, scheduler))"
        )
    return options


class ShardedAdamW(AdamW):
    """``torch.optim.AdamW``, which is elementwise and so the same on shards; its states are plain tensors of this
    rank's rows.

    The step runs where the states are, also if they have been moved to the host.

    :param master_weights: for 16-bit parameters: keep an fp32 copy in the states, step on it, and round it into the
        parameters (arXiv:1710.03740, §3.1).
    :param on_host: states are created in host memory and stay there.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        master_weights: bool = False,
        on_host: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.master_weights, self.on_host = master_weights, on_host

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights, gradients, means, squares, steps = [], [], [], [], []
        written: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state_of(parameter)
            rows, mean = local(parameter), state["exp_avg"]
            if rows.numel() == 0:  # the last ranks may have no rows of a short parameter
                state["step"] += 1
                continue
            weight = state.get("master", rows)
            if weight.device != mean.device:
                weight = weight.to(mean.device)
            if state["step"].device != mean.device:
                state["step"] = state["step"].to(mean.device)
            if weight is not rows:
                written.append((rows, weight))
            weights.append(weight)
            gradients.append(local(parameter.grad).to(mean.device, weight.dtype))
            means.append(mean)
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        if not weights:
            return
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for rows, weight in written:
            rows.copy_(weight)

    def state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        """A parameter's states, created when first needed: step (0-d fp32), exp_avg, exp_avg_sq, and with masters,
        master."""
        state = self.state[parameter]
        if not state:
            rows = local(parameter).detach()
            home = torch.device("cpu") if self.on_host else rows.device
            if self.master_weights:
                state["master"] = rows.to(home, torch.float32, copy=True)
            kind = torch.float32 if self.master_weights else rows.dtype
            state["exp_avg"] = torch.zeros(rows.shape, dtype=kind, device=home)
            state["exp_avg_sq"] = torch.zeros(rows.shape, dtype=kind, device=home)
            # The fused kernel needs its step on the device of the moments.
            state["step"] = torch.zeros((), dtype=torch.float32, device=home)
        return state

    @torch.no_grad()
    def renew_masters(self) -> None:
        """Copy the parameters into the master copies, after the parameters have been written elsewhere."""
        for parameter, state in self.state.items():
            if "master" in state:
                state["master"].copy_(local(parameter))
