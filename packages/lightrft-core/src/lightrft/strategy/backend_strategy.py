"""The seven abstract methods of ``StrategyBase``, implemented once over hooks that each backend fills.

Counting micro-batches, skipping steps, stepping schedulers and freezing models must not differ between backends, so it
is done here. ``NativeStrategy`` fills the hooks with torch's own optimizers, DeepSpeed with its engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import checkpoint
from .hub_layout import unwrap
from .meta_init import FillPlan, Unfilled
from .optimizers import decay_groups
from .sealed_file import Seals
from .state_source import StateSource
from .strategy_base import ModelRecord, StepResult, StrategyBase, logger
from .weights import TensorSpec


class BackendStrategy(StrategyBase):
    """Implements the seven methods with the hooks at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unfilled = Unfilled()

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
        groups = decay_groups(model.named_parameters(), options.pop("weight_decay"), ndim=self._axes)
        if not groups:
            raise ValueError(
                "create_optimizer: the model has no trainable parameter; set requires_grad on some of them"
            )
        record = self.record(model)
        record.optimizer = self._make_optimizer(groups, options)
        self._optimizer_made(record)
        return record.optimizer

    def prepare(self, *models: Any, is_rlhf: bool = False, trainable: Sequence[nn.Module] | None = None) -> Any:
        self.setup_distributed()
        for item in models:
            model = item[0] if isinstance(item, tuple) else item
            if trainable is not None and model is not None and not any(model is other for other in trainable):
                model.requires_grad_(False).eval()
        with self.waits_for_ranks("prepare"):
            prepared = tuple(self._prepare_item(item) for item in models)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(self, model: nn.Module, shard_size: int | None = None, is_training: bool = False) -> nn.Module:
        self.setup_distributed()
        if not is_training:
            model.requires_grad_(False).eval()
        with self.waits_for_ranks("prepare_model"):
            return self._prepare(model, self.layout.shard_size(shard_size))

    def _prepare_item(self, item: Any) -> Any:
        if not isinstance(item, tuple):
            return None if item is None else self._prepare(item, self.layout.world_size)
        model, optimizer, scheduler = (*item, None, None)[:3]
        if model is None:
            return item
        record = self.record(model)
        record.remember(optimizer, scheduler)
        return (self._prepare(model, self.layout.world_size), *item[1:])

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
        record = self._trained_record(model, optimizer, "backward")
        record.micro_steps += 1
        record.at_boundary = record.micro_steps % self.accumulated_gradient == 0 if boundary is None else boundary
        # Backends average over ranks; a share of a global mean is summed instead.
        share = 1 / self.accumulated_gradient if scale is None else scale * self._averaging_ranks(record)
        with self.waits_for_ranks("backward"):
            self._backpropagate(record, loss * share)

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> StepResult:
        _refuse_unknown("optimizer_step", kwargs)
        record = self._trained_record(model, optimizer, "optimizer_step")
        record.remember(scheduler=scheduler)
        if not record.at_boundary:
            if not (record.micro_steps or record.told_of_no_backward):
                record.told_of_no_backward = True
                logger.warning(
                    "%s: optimizer_step does nothing: no strategy.backward(loss, model, optimizer) came before it "
                    "(loss.backward() does not count)",
                    name,
                )
            return StepResult(stepped=False)
        record.at_boundary, record.micro_steps = False, 0
        with self.waits_for_ranks("optimizer_step"):
            stepped, norm = self._step(record)
        if not stepped:
            record.skipped_steps += 1
            logger.warning(
                "%s: gradient norm is %s, step skipped on all ranks (%d so far)", name, norm, record.skipped_steps
            )
        elif scheduler is not None:
            scheduler.step()
        return StepResult(stepped=stepped, skipped=not stepped, grad_norm=norm)

    # ---- models that were built on the meta device -------------------------------------------------------------------
    def _read_pretrained(self, model: nn.Module, plan: FillPlan | None) -> None:
        """Read the values that the plan found in pretrained files. A model that lacks some still cannot be used."""
        if plan is None or not self._unfilled.expect(model, plan):
            return
        if plan.files:
            specs = self.hub_layout(model).by_name
            self._import(model, {name: specs[name].spec for name in plan.files}, plan.tensors())
        if not plan.unknown:
            self._unfilled.filled(model)

    def import_weights(self, model: nn.Module, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._import(model, {spec.name: spec for spec in self.hub_layout(model).specs}, source)
        self._unfilled.filled(model)

    def write_state(self, record: ModelRecord, folder: Path, *, asynchronous: bool) -> Seals | Future[Seals] | None:
        self._unfilled.require_none(record.model)
        return super().write_state(record, folder, asynchronous=asynchronous)

    def take_state(self, model: nn.Module, optimizer: Optimizer | None, source: StateSource) -> None:
        super().take_state(model, optimizer, source)
        self._unfilled.filled(model)

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def save_ckpt(self, model: nn.Module | Mapping[str, nn.Module], save_dir: str | Path, **kwargs: Any) -> None:
        checkpoint.save(self, model, Path(save_dir), **kwargs)

    def load_ckpt(self, model: nn.Module | Mapping[str, nn.Module], load_dir: str | Path, **kwargs: Any) -> Any:
        return checkpoint.load(self, model, Path(load_dir), **kwargs)

    # ---- hooks -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def _prepare(self, model: nn.Module, shard_size: int) -> nn.Module:
        """Move a model to the device and shard it over ``shard_size`` ranks. Its optimizer may exist already.

        :return: what the user must call: the model itself, or a wrapper. Preparing it again changes nothing.
        """

    @abstractmethod
    def _backpropagate(self, record: ModelRecord, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``; ``record.at_boundary`` says whether an optimizer step follows."""

    @abstractmethod
    def _step(self, record: ModelRecord) -> tuple[bool, float]:
        """Clip, step and clear the gradients, or skip the step on all ranks.

        :return: whether the weights moved, and the global gradient norm before clipping, the same on all ranks.
        """

    @abstractmethod
    def _import(
        self, model: nn.Module, specs: Mapping[str, TensorSpec], source: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        """Copy (hub name, whole tensor) pairs into the model; every one of ``specs`` must come, once."""

    def _trained_record(self, model: nn.Module, optimizer: Optimizer, method: str) -> ModelRecord:
        """The record of a model that is being trained with ``optimizer``; ``method`` is what was called."""
        record = self.record(model)
        record.optimizer = optimizer
        return record

    def _axes(self, parameter: nn.Parameter) -> int:
        """Number of axes of the whole parameter, even if its shards are flat."""
        return parameter.ndim

    def _make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
        """``options`` are AdamW's keywords."""
        return torch.optim.AdamW(groups, **{"fused": True, **options})

    def _optimizer_made(self, record: ModelRecord) -> None:
        """``record.optimizer`` is new; the model may have been prepared before."""

    def _averaging_ranks(self, record: ModelRecord) -> int:
        """Number of data ranks over which the backend averages gradients.

        A model that splits sequences over ranks multiplies each rank's gradient by the number of parts, so that the
        average over all ranks is the mean over data ranks.
        """
        return 1


def _refuse_unknown(method: str, kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"{method}: unknown argument {', '.join(kwargs)}")
