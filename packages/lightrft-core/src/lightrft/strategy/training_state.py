"""Training state by parameter name: what a checkpoint means, whatever files hold it.

Each backend can stream its state as :class:`StateItem` and take it back; DeepSpeed's and DCP's files, and the portable
form, are codecs of that stream. Names are those of the unwrapped module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError
from .hub_layout import hub_sources


@dataclass(frozen=True, kw_only=True)
class StateItem:
    """One module parameter (or persistent buffer), whole, on the CPU.

    :param name: module name inside the unwrapped model.
    :param weight: the trained value, in the optimizer's precision (fp32 master weights where there are any).
    :param moments: optimizer tensors of the same shape (``exp_avg``, ``exp_avg_sq``), empty for frozen parameters.
    :param step: optimizer steps that this parameter has seen.
    """

    name: str
    weight: torch.Tensor
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(moment.nbytes for moment in self.moments.values())


def receive_items(
    model: nn.Module, items: Iterable[StateItem], shape_of: Callable[[Any], torch.Size] = lambda tensor: tensor.shape
) -> Iterator[tuple[StateItem, torch.Tensor]]:
    """Each item with the model's parameter that it is for. Every parameter must come, once.

    :param shape_of: the whole shape of a parameter, for backends whose shards are flat.
    :raises CheckpointError: an unknown name, another shape, or, at the end, parameters that never came.
    """
    wanted = dict(hub_sources(model))
    for item in items:
        tensor = wanted.pop(item.name, None)
        if tensor is None or shape_of(tensor) != item.weight.shape:
            have = "no such parameter" if tensor is None else f"{tuple(shape_of(tensor))} here"
            raise CheckpointError(f"{item.name}: {tuple(item.weight.shape)} in the checkpoint, {have}")
        yield item, tensor
    if wanted:
        raise CheckpointError(f"the checkpoint lacks {len(wanted)} parameters, the first is {next(iter(wanted))}")
