"""Write weights and optimizer states in PyTorch's Distributed Checkpoint format (DCP): each rank its rows.

Core reads these files (:mod:`lightrft.strategy.dcp_files`), for any backend.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy.dcp_files import save
from lightrft.strategy.fragments import in_background
from lightrft.strategy.host_copies import HostCopies
from lightrft.strategy.hub_layout import hub_sources
from lightrft.strategy.sealed_file import Seals

from .shards import like, local
from .state import MASTER, STEP, rows_of


def write(model: nn.Module, optimizer: Optimizer | None, folder: Path) -> Seals:
    """Write into ``folder`` from all ranks.

    :return: seals of the files that this rank wrote.
    :raises CheckpointError: a rank could not write.
    """
    rows, wholes = _rows(model, optimizer)
    return save(_wrapped(rows, wholes), folder)


def write_copies(
    model: nn.Module, optimizer: Optimizer | None, folder: Path, copies: HostCopies, group: dist.ProcessGroup
) -> Future[Seals]:
    """The same in the background, from copies of the state.

    :param group: ranks that write, over gloo; used for nothing else.
    """
    rows, wholes = _rows(model, optimizer)
    state = _wrapped(copies.take(rows), wholes)
    return in_background(lambda: save(state, folder, process_group=group))


def _rows(
    model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """This rank's tensors by key, and the parameter like which each is sharded; None: it is whole."""
    rows: dict[str, torch.Tensor] = {}
    wholes: dict[str, torch.Tensor | None] = {}
    for name, tensor in hub_sources(model):
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        held = {"weight": local(state.get(MASTER, tensor)), **rows_of(name, state, local(tensor))}
        for kind, value in held.items():
            rows[f"{kind}/{name}"], wholes[f"{kind}/{name}"] = value.detach(), tensor
        if isinstance(step := state.get(STEP), torch.Tensor):
            rows[f"{STEP}/{name}"], wholes[f"{STEP}/{name}"] = step, None
    return rows, wholes


def _wrapped(rows: dict[str, torch.Tensor], wholes: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {key: value if (whole := wholes[key]) is None else like(whole, value) for key, value in rows.items()}
