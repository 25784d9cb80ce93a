"""Training state of plain (unsharded) modules, and its codec in safetensors.

One file holds ``weight/NAME`` and ``moment/KIND/NAME`` tensors; ``step`` is in the file's own metadata. Any backend can
write and read it through :class:`StateItem`, which makes it the portable form too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from .hub_layout import hub_sources
from .training_state import StateItem, receive_items

if TYPE_CHECKING:
    from .strategy_base import ModelRecord, StrategyBase

STATE_FILE = "state.safetensors"


def iter_state(model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
    """See :meth:`StrategyBase.iter_state`. Tensors are copies on the CPU."""
    for name, tensor in hub_sources(model):
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        moments = {
            k: _copy(v)
            for k, v in state.items()
            if isinstance(v, torch.Tensor) and v.shape == tensor.shape and k != "step"
        }
        yield StateItem(name=name, weight=_copy(tensor), moments=moments, step=int(state.get("step", 0)))


@torch.no_grad()
def load_state(model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
    """See :meth:`StrategyBase.load_state`.

    :raises CheckpointError: names or shapes differ from the model's.
    """
    for item, tensor in receive_items(model, items):
        tensor.copy_(item.weight)
        if optimizer is None:
            continue
        optimizer.state.pop(tensor, None)  # a parameter that had not stepped yet must not keep what it has seen since
        if item.moments:
            state: dict[str, Any] = {k: v.to(tensor.device, copy=True) for k, v in item.moments.items()}
            optimizer.state[tensor] = {"step": torch.tensor(float(item.step)), **state}


def write(strategy: StrategyBase, record: ModelRecord, folder: Path, *, asynchronous: bool) -> Any:
    """Write the state as one safetensors file, from rank 0. With ``asynchronous`` the file is written by a thread."""
    tensors: dict[str, torch.Tensor] = {}
    steps: dict[str, int] = {}
    for item in strategy.iter_state(record.model, record.optimizer):
        tensors[f"weight/{item.name}"] = item.weight
        tensors |= {f"moment/{kind}/{item.name}": moment for kind, moment in item.moments.items()}
        steps[item.name] = item.step
    if not strategy.is_rank_0():
        return None
    if not asynchronous:
        return save_file(tensors, folder / STATE_FILE, metadata={"step": json.dumps(steps)})
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    try:
        return pool.submit(save_file, tensors, folder / STATE_FILE, metadata={"step": json.dumps(steps)})
    finally:
        pool.shutdown(wait=False)


def read(strategy: StrategyBase, record: ModelRecord, folder: Path, *, optimizer: bool) -> None:
    """Read what :func:`write` wrote, tensor by tensor."""
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        strategy.load_state(record.model, record.optimizer if optimizer else None, _items(file))


def _items(file: Any) -> Iterator[StateItem]:
    steps = json.loads(file.metadata()["step"])
    keys = set(file.keys())
    kinds = sorted({key.split("/")[1] for key in keys if key.startswith("moment/")})
    for name, step in steps.items():
        moments = {k: file.get_tensor(f"moment/{k}/{name}") for k in kinds if f"moment/{k}/{name}" in keys}
        yield StateItem(name=name, weight=file.get_tensor(f"weight/{name}"), moments=moments, step=step)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
