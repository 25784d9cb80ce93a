"""Every rank holds the whole model; gradients are summed at the boundary. The documents' seven methods, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy import StepResult, StrategyBase, checkpoint
from lightrft.strategy.optimizers import decay_groups, rebind


class RingStrategy(StrategyBase):
    """Data parallelism with one all-reduce a step."""

    name = "ring"
    implied: ClassVar[Mapping[str, Any]] = {"strategy": "ring"}

    def setup_distributed(self, timeout: Any = None) -> None:
        self.join_ranks(timeout)

    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        c = self.config
        options = {
            "lr": c.critic_learning_rate if getattr(model, "is_critic", False) else c.actor_learning_rate,
            "betas": c.adam_betas,
            "eps": c.adam_eps,
            "weight_decay": c.l2,
            **kwargs,
        }
        groups = decay_groups(model.named_parameters(), options.pop("weight_decay"))
        if not groups:
            raise ValueError("the model has no trainable parameter")
        optimizer = torch.optim.AdamW(groups, **options)
        self.record(model).optimizer = optimizer
        return optimizer

    def prepare(self, *models: Any, is_rlhf: bool = False, trainable: Sequence[nn.Module] | None = None) -> Any:
        self.setup_distributed()
        prepared = []
        for item in models:
            model, optimizer, scheduler = (*item, None, None)[:3] if isinstance(item, tuple) else (item, None, None)
            if model is not None:
                self._adopt(model, optimizer, scheduler, trainable)
            prepared.append(item)
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def _adopt(self, model: nn.Module, optimizer: Any, scheduler: Any, trainable: Sequence[nn.Module] | None) -> None:
        if trainable is not None and not any(model is other for other in trainable):
            model.requires_grad_(False).eval()
        record, model = self.record(model), model.to(self.device)
        if optimizer is not None:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            rebind(optimizer, names, dict(model.named_parameters()))
            record.optimizer = optimizer
        record.scheduler = scheduler or record.scheduler
        if self.config.bf16 and not hasattr(model, "ring_forward"):
            model.ring_forward = model.forward
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)

    def backward(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scale: Any = None,
        boundary: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise TypeError(f"backward: unknown {', '.join(kwargs)}")
        record = self.record(model)
        record.micro_steps += 1
        record.at_boundary = record.micro_steps % self.accumulated_gradient == 0 if boundary is None else boundary
        share = 1 / self.accumulated_gradient / self.world_size if scale is None else scale
        with self.waits_for_ranks("backward"):  # what fails in there is told to the ranks that wait for this one
            (loss * share).backward()

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> StepResult:
        if kwargs:
            raise TypeError(f"optimizer_step: unknown {', '.join(kwargs)}")
        record = self.record(model)
        record.optimizer, record.scheduler = optimizer, scheduler or record.scheduler
        if not record.at_boundary:
            return StepResult(stepped=False)
        record.at_boundary, record.micro_steps = False, 0
        with self.waits_for_ranks("optimizer_step"):
            norm = self._step(optimizer, model)
        finite = norm < float("inf")  # False for NaN too
        if finite and scheduler is not None:
            scheduler.step()
        record.skipped_steps += not finite
        return StepResult(stepped=finite, skipped=not finite, grad_norm=norm)

    def _step(self, optimizer: Optimizer, model: nn.Module) -> float:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if self.world_size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if norm < float("inf"):
            if self.config.max_norm > 0:
                torch._foreach_mul_(gradients, min(1.0, self.config.max_norm / (norm + 1e-6)))
            optimizer.step()
        optimizer.zero_grad()
        return norm

    def save_ckpt(self, model: Any, save_dir: str | Path, **kwargs: Any) -> None:
        checkpoint.save(self, model, Path(save_dir), **kwargs)

    def load_ckpt(self, model: Any, load_dir: str | Path, **kwargs: Any) -> Any:
        return checkpoint.load(self, model, Path(load_dir), **kwargs)
