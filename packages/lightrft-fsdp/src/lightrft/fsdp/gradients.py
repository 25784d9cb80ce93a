"""The gradient norm of one model, over all its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from .shards import cut_of, like, local


def global_norm(gradients: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """L2 norm over the gradients of one model, 0-d fp32, the same on every rank.

    Each rank sums the squares of its own rows; sums over the same ranks are then added in one collective.
    """
    by_group: dict[dist.ProcessGroup | None, list[torch.Tensor]] = {}
    cut_groups: dict[tuple[int, object], dist.ProcessGroup | None] = {}
    for gradient in gradients:
        # Thousands of gradients share a few meshes: look each up once.
        key = (id(getattr(gradient, "device_mesh", None)), getattr(gradient, "placements", None))
        if key not in cut_groups:
            cut = cut_of(gradient)
            cut_groups[key] = cut.group if cut is not None else None
        part = local(gradient)
        rows = by_group.setdefault(cut_groups[key], [])
        if part.numel():
            rows.append(part)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for group, parts in by_group.items():
        square = _square_sum(parts, device)
        if group is not None:
            dist.all_reduce(square, group=group)
        total += square
    return total.sqrt()


def widen(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Cast 16-bit gradients to fp32, in which the next micro-batches are added."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype.is_floating_point and gradient.dtype.itemsize < 4:
            parameter.grad_dtype = None  # otherwise only the parameter's dtype is allowed
            parameter.grad = like(parameter, local(gradient).float())


def _square_sum(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not parts:  # this rank has no rows, but must join the collective
        return torch.zeros((), dtype=torch.float32, device=device)
    norms = torch._foreach_norm(parts, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).square().to(device)
