"""A strategy whose models are plain or sharded torch modules, and whose optimizers are torch's own.

FakeStrategy is this with one process; FSDP2 is this with sharded parameters. What differs is in the hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import checkpoint
from .hub_layout import unwrap
from .journal import watch_calls
from .optimizers import decay_groups, rebind
from .strategy_base import ModelRecord, StepResult, StrategyBase, logger


class NativeStrategy(StrategyBase):
    """Implements the documents' seven over torch modules. Override the hooks at the end."""

    def setup_distributed(self, timeout: timedelta | float | None = None) -> None:
        self.join_ranks(timeout)

    # ---- preparing ---------------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        self.setup_distributed()
        critic = getattr(unwrap(model), "is_critic", False)
        options = {
            "lr": self.config.critic_learning_rate if critic else self.config.actor_learning_rate,
            "betas": self.config.adam_betas,
            "eps": self.config.adam_eps,
            "weight_decay": self.config.l2,
            **kwargs,
        }
        groups = decay_groups(model.named_parameters(), options.pop("weight_decay"))
        if not groups:
            raise ValueError("create_optimizer: the model has no trainable parameter; set requires_grad on some")
        optimizer = self._make_optimizer(groups, options)
        self.record(model).optimizer = optimizer
        return optimizer

    def prepare(self, *models: Any, is_rlhf: bool = False, trainable: Sequence[nn.Module] | None = None) -> Any:
        self.setup_distributed()
        for item in models:
            model = item[0] if isinstance(item, tuple) else item
            if trainable is not None and model is not None and not any(model is other for other in trainable):
                model.requires_grad_(False).eval()
        prepared = tuple(self._prepare_item(item) for item in models)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(self, model: nn.Module, shard_size: int | None = None, is_training: bool = False) -> nn.Module:
        self.setup_distributed()
        if not is_training:
            model.requires_grad_(False).eval()
        return self._prepare(model, self.layout.shard_size(shard_size))

    def _prepare_item(self, item: Any) -> Any:
        if not isinstance(item, tuple):
            return None if item is None else self._prepare(item, self.layout.world_size)
        model, optimizer, scheduler = (*item, None, None)[:3]
        if model is None:
            return item
        record = self.record(model)
        record.optimizer = optimizer if optimizer is not None else record.optimizer
        record.scheduler = scheduler if scheduler is not None else record.scheduler
        return (self._prepare(model, self.layout.world_size), *item[1:])

    def _prepare(self, model: nn.Module, shard_size: int) -> nn.Module:
        """Place and shard a model, and re-bind the optimizer that was made before."""
        record = self.record(model)
        if record.shard_size is not None:
            return model  # prepared already
        record.shard_size = shard_size
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        prepared = self._place(model, shard_size)
        if self._waits_in_forward(prepared):
            watch_calls(prepared, self.waits_for_ranks)
        if record.optimizer is not None:
            rebind(record.optimizer, names, dict(model.named_parameters()))
        return prepared

    # ---- training ----------------------------------------------------------------------------------------------------
    def backward(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scale: float | torch.Tensor | None = None,
        boundary: bool | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown("backward", kwargs)
        record = self.record(model)
        record.optimizer = optimizer
        record.micro_steps += 1
        record.at_boundary = record.micro_steps % self.accumulated_gradient == 0 if boundary is None else boundary
        # Backends average over ranks; a share of a global mean is summed instead.
        share = 1 / self.accumulated_gradient if scale is None else scale * self._averaging_ranks(record)
        with self.waits_for_ranks("backward"):
            self._before_backward(record)
            (loss * share * record.loss_scale.value).backward()

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> StepResult:
        _refuse_unknown("optimizer_step", kwargs)
        record = self.record(model)
        record.optimizer = optimizer
        record.scheduler = scheduler if scheduler is not None else record.scheduler
        if not record.at_boundary:
            return StepResult(stepped=False)
        record.at_boundary, record.micro_steps = False, 0
        with self.waits_for_ranks("optimizer_step"):
            parameters = [p for p in model.parameters() if p.grad is not None]
            norm = self._grad_norm([p.grad for p in parameters if p.grad is not None]) / record.loss_scale.value
            finite = bool(torch.isfinite(norm))
            if finite:
                self._scale_gradients(parameters, norm, record.loss_scale.value)
                optimizer.step()
            else:
                record.skipped_steps += 1
                logger.warning(
                    "%s: gradient norm is %s, step skipped on all ranks (%d so far)",
                    name,
                    norm.item(),
                    record.skipped_steps,
                )
            optimizer.zero_grad(set_to_none=True)
            record.loss_scale.update(finite=finite)
        if finite and scheduler is not None:
            scheduler.step()
        return StepResult(stepped=finite, skipped=not finite, grad_norm=norm.item())

    def _scale_gradients(self, parameters: Sequence[nn.Parameter], norm: torch.Tensor, loss_scale: float) -> None:
        """Undo the loss scale and clip to ``max_norm`` (0: no clipping), in one pass where anything is to be done."""
        factor = 1 / loss_scale
        if self.config.max_norm > 0:
            factor *= min(self.config.max_norm / (norm.item() + 1e-6), 1.0)
        if factor != 1 and parameters:
            torch._foreach_mul_([self._local(p.grad) for p in parameters], factor)

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def save_ckpt(self, model: nn.Module | Mapping[str, nn.Module], save_dir: str | Path, **kwargs: Any) -> None:
        checkpoint.save(self, model, Path(save_dir), **kwargs)

    def load_ckpt(self, model: nn.Module | Mapping[str, nn.Module], load_dir: str | Path, **kwargs: Any) -> Any:
        return checkpoint.load(self, model, Path(load_dir), **kwargs)

    # ---- hooks -------------------------------------------------------------------------------------------------------
    def _place(self, model: nn.Module, shard_size: int) -> nn.Module:
        """Put the model where it computes; a sharded backend shards it over ``shard_size`` ranks, in place."""
        return model.to(self.device)

    def _waits_in_forward(self, model: nn.Module) -> bool:
        """Does a forward pass wait for other ranks? Then the one that does not come is named."""
        return False

    def _make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
        """``options`` are AdamW's keywords."""
        return torch.optim.AdamW(groups, **{"fused": True, **options})

    def _averaging_ranks(self, record: ModelRecord) -> int:
        """Over how many ranks the backend averages gradients."""
        return 1

    def _before_backward(self, record: ModelRecord) -> None:
        """``record.at_boundary`` says whether the optimizer acts after this backward pass."""

    def _grad_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Global L2 norm of the gradients, the same on all ranks, 0-d."""
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.nn.utils.get_total_norm(gradients)

    def _local(self, tensor: Any) -> torch.Tensor:
        """This rank's part of a (sharded) tensor, sharing its memory."""
        return tensor


def _refuse_unknown(method: str, kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"{method}: unknown argument {', '.join(kwargs)}; it would be ignored")
