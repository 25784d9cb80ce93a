"""Reduce and gather over ranks, for tensors, numbers and dicts of them. Every rank of the group must call.

Arguments are never changed in place. The numbers of a dict travel together, as Python objects: one rank's sum may be
the int 0 where the others' are floats, and tensors of two dtypes would wait for each other until the deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

ReduceOp = Literal["mean", "sum", "max", "min"]
OPS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
OF_NUMBERS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "sum": sum,
    "max": max,
    "min": min,
}
Group = dist.ProcessGroup | None
# Stands for a group of one rank; None stands for all ranks.
ALONE: Any = dist.GroupMember.NON_GROUP_MEMBER


def size_of(group: Group) -> int:
    """Ranks of a group (None: all), 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() and group is not ALONE else 1


def all_reduce(data: Any, op: str = "mean", group: Group = None) -> Any:
    """Reduce over ``group``; the result has the structure of ``data``.

    Tensors keep shape and dtype (the mean of an integer tensor is of torch's default float dtype); sums of 16-bit
    tensors are formed in fp32. Python numbers come back as Python numbers: ints stay ints except for "mean".

    :raises ValueError: unknown ``op``, or not all ranks have equally many numbers.
    :raises TypeError: something that cannot be reduced.
    """
    if op not in OPS:
        raise ValueError(f"all_reduce op {op!r}: must be one of {', '.join(OPS)}")
    numbers: list[tuple[int | float, Callable[[Any], None]]] = []
    result: list[Any] = [None]
    _reduce_into(data, op, group, result.__setitem__, 0, numbers)
    if numbers:
        gathered = all_gather_object([value for value, _ in numbers], group)
        if len(counts := set(map(len, gathered))) > 1:
            raise ValueError(f"all_reduce of {min(counts)} to {max(counts)} numbers: all ranks must pass equally many")
        for (_, put), *values in zip(numbers, *gathered, strict=True):
            # NaN has no order: among the others it might be neither the largest nor the smallest.
            put(math.nan if any(value != value for value in values) else OF_NUMBERS[op](values))
    return result[0]


def all_gather(data: Any, group: Group = None) -> Any:
    """Gather from ``group`` in rank order; the result has the structure of ``data``.

    A tensor ``[n, ...]`` comes back as ``[sum of n, ...]`` (ranks may differ in ``n``), a 0-d one as ``[ranks]``; a
    Python number or string as a list with one entry per rank.
    """
    if isinstance(data, Mapping):
        return {key: all_gather(value, group) for key, value in data.items()}
    if isinstance(data, torch.Tensor):
        return _gather_tensor(data, group)
    return all_gather_object(data, group)


def all_gather_object(data: Any, group: Group = None) -> list[Any]:
    """Any picklable object from each rank of ``group``, in rank order. Pickled: safe within a run."""
    if size_of(group) == 1:
        return [data]
    gathered: list[Any] = [None] * size_of(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def _reduce_into(
    data: Any, op: str, group: Group, put: Callable[[Any, Any], None], key: Any, numbers: list[Any]
) -> None:
    if getattr(data, "shape", None) == () and not isinstance(data, torch.Tensor):  # a number of numpy's
        data = data.item()
    if isinstance(data, Mapping):
        filled: dict[Any, Any] = dict.fromkeys(data)  # keeps the order, since numbers are filled in later
        put(key, filled)
        for name, value in data.items():
            _reduce_into(value, op, group, filled.__setitem__, name, numbers)
    elif isinstance(data, torch.Tensor):
        put(key, _reduce_tensor(data, op, group))
    elif isinstance(data, (bool, int, float)):
        numbers.append((int(data) if isinstance(data, bool) else data, lambda value: put(key, value)))
    else:
        raise TypeError(f"all_reduce takes tensors, numbers and dicts of them, not {type(data).__name__}")


def _reduce_tensor(tensor: torch.Tensor, op: str, group: Group) -> torch.Tensor:
    kind = tensor.dtype
    work = tensor.detach().clone(memory_format=torch.contiguous_format)
    if kind == torch.bool:
        work = work.to(torch.int64)
    elif kind.is_floating_point and kind.itemsize < 4 and op in ("sum", "mean"):
        work = work.float()
    if size_of(group) > 1:
        dist.all_reduce(work, op=OPS[op], group=group)
    if op == "mean":
        if not work.dtype.is_floating_point and not work.dtype.is_complex:
            return (work.double() / size_of(group)).to(torch.get_default_dtype())
        work = work / size_of(group)
    if kind == torch.bool:
        return work if op == "sum" else work.to(torch.bool)
    return work.to(kind)


def _gather_tensor(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach().contiguous()
    if size_of(group) == 1:
        return rows.clone()
    lengths = [shape[0] for shape in all_gather_object(tuple(rows.shape), group)]
    longest = max(lengths)
    padded = rows
    if rows.shape[0] < longest:
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
