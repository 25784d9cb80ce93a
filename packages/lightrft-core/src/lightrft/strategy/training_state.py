"""Training state by parameter name: what a checkpoint means, whatever files hold it.

Each backend can stream its state as :class:`StateItem` and take it back; DeepSpeed's and DCP's files, and the portable
form, are codecs of that stream. Names are those of the unwrapped module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


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
