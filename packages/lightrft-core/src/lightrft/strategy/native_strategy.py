"""A strategy whose models are plain or sharded torch modules, and whose optimizers are torch's own.

FakeStrategy is one in a single process, FSDP2 one with sharded parameters. They differ in the hooks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import plain_state
from .backend_strategy import BackendStrategy
from .optimizers import rebind
from .strategy_base import ModelRecord
from .training_state import StateItem
from .weights import TensorSpec, UpdatePlan, WeightBucket


class NativeStrategy(BackendStrategy):
    """Steps torch's optimizers over torch modules, and clips gradients itself. Override the hooks at the end."""

    def _prepare(self, model: nn.Module, shard_size: int) -> nn.Module:
        """Place and shard a model, and re-bind an optimizer that was made before."""
        record = self.record(model)
        if record.shard_size is not None:
            return model  # prepared already
        record.shard_size = shard_size
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        prepared = self._place(model, shard_size)
        if self._waits_in_forward(prepared):
            _watch_calls(prepared, self.waits_for_ranks)
        if record.optimizer is not None:
            rebind(record.optimizer, names, dict(model.named_parameters()))
        return prepared

    # ---- weights and state by name: a model that waits for values has none to give -----------------------------------
    def export_weights(self, model: nn.Module, plan: UpdatePlan) -> Iterator[WeightBucket]:
        self._unfilled.require_none(model)
        return super().export_weights(model, plan)

    def iter_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
        self._unfilled.require_none(model)
        return super().iter_state(model, optimizer)

    def load_state(self, model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
        super().load_state(model, optimizer, items)
        self._unfilled.filled(model)

    def _import(
        self, model: nn.Module, specs: Mapping[str, TensorSpec], source: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        plain_state.import_weights(model, self.hub_layout(model), specs, source)

    # ---- training ----------------------------------------------------------------------------------------------------
    def _backpropagate(self, record: ModelRecord, loss: torch.Tensor) -> None:
        (loss * record.loss_scale.value).backward()

    def _step(self, record: ModelRecord) -> tuple[bool, float]:
        optimizer, scale = record.optimizer, record.loss_scale
        assert optimizer is not None, "backward brought it"
        parameters = [p for p in record.model.parameters() if p.grad is not None]
        norm = self._grad_norm([p.grad for p in parameters if p.grad is not None]) / scale.value
        finite = bool(torch.isfinite(norm))
        if finite:
            self._scale_gradients(parameters, norm, scale.value)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scale.update(finite=finite)
        return finite, norm.item()

    def _scale_gradients(self, parameters: Sequence[nn.Parameter], norm: torch.Tensor, loss_scale: float) -> None:
        """Undo the loss scale and clip to ``max_norm`` (0: no clipping), in one pass, if needed."""
        factor = 1 / loss_scale
        if self.config.max_norm > 0:
            factor *= min(self.config.max_norm / (norm.item() + 1e-6), 1.0)
        if factor != 1 and parameters:
            torch._foreach_mul_([self._local(p.grad) for p in parameters], factor)

    # ---- hooks -------------------------------------------------------------------------------------------------------
    def _place(self, model: nn.Module, shard_size: int) -> nn.Module:
        """Move the model to its device; a sharded backend shards it over ``shard_size`` ranks, in place."""
        return model.to(self.device)

    def _waits_in_forward(self, model: nn.Module) -> bool:
        """Whether a forward pass waits for other ranks, so that a late one must be named."""
        return False

    def _grad_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Global L2 norm of the gradients, the same on all ranks, 0-d."""
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.nn.utils.get_total_norm(gradients)

    def _local(self, tensor: Any) -> torch.Tensor:
        """This rank's part of a (sharded) tensor, sharing its memory."""
        return tensor


def _watch_calls(model: nn.Module, operation: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
    """Make each call of ``model`` an operation: a sharded model waits for other ranks while it computes.

    As in ``fully_shard`` the class is replaced by a subclass; a hook could not see what other hooks raise.

    :param operation: a bound method, which is not kept alive.
    """
    kind, reference = type(model), weakref.WeakMethod(operation)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        alive = reference()
        with alive("forward") if alive is not None else contextlib.nullcontext():
            return kind.__call__(self, *args, **kwargs)

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    watched = type(kind.__name__, (kind,), {**named, "__call__": __call__})
    model.__class__ = watched
