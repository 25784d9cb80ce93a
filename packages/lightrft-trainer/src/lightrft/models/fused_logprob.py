"""Token logprobs and entropies from hidden states, with the logits of one chunk of tokens at a time.

For N tokens, a width of H and a vocabulary of V, the logits and their gradient are two N × V matrices. Here both passes
go through chunks of c tokens, so that memory grows with c × V. The backward pass computes a chunk's logits again: that
is one matrix product of four, but saves the passes over N × V numbers in memory of the plain computation.

On a GPU both passes go through parts of the vocabulary instead, for all tokens, whose logits one kernel reads
(:mod:`.logit_kernels`): each row of the weight's gradient is finished at once, in the weight's dtype, and the part that
the forward pass computes last need not be computed again.

Liger's fused linear cross entropy and cut cross entropy (arXiv:2411.09009) do the same in GPU kernels; neither returns
the entropy or runs on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.strategy.device import multiplies, widens_products
from lightrft.strategy.wide_products import wide_linear

from . import logit_kernels
from .logprobs import LOWEST_LOGPROB

BLOCK_BYTES = 64 * 2**20
"""Memory for the matrices of a block on a CPU: its products lose nothing then. An accelerator takes 8 times as much."""
SMALLEST_BLOCK = 256
"""Tokens below which the products of a block take notably longer."""


def rows_in_block(
    chunk_size: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, matrices: int = 1
) -> int:
    """Tokens whose logits are computed at a time: ``chunk_size``, or fewer if that is as fast.

    :param matrices: number of matrices of a block's size at the same time.
    """
    budget = BLOCK_BYTES if device.type == "cpu" else 8 * BLOCK_BYTES
    return max(1, min(chunk_size, max(SMALLEST_BLOCK, budget // (matrices * vocabulary * dtype.itemsize))))


class _FusedStatistics(torch.autograd.Function):
    """Logprobs ``[N]`` and entropies ``[N]`` of hidden states ``[N, H]`` under ``[V, H]`` weights and a temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        with_entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        normalizers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if with_entropy else None
        logits_of = _Logits(weight, bias, temperature, dtype, min(rows, len(hidden)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = logits_of(hidden[part])
            peak = logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(-1, labels[part, None]).sub_(peak)[:, 0]
            shifted = logits.sub_(peak)
            if entropies is None:
                total = shifted.exp_().sum(dim=-1).log_()
            else:
                weights = shifted.exp()
                sums = weights.sum(dim=-1)
                total = sums.log()
                # A masked token has the logit -inf: its term is 0, not 0 × inf.
                mean = weights.mul_(shifted.clamp_min_(torch.finfo(dtype).min)).sum(dim=-1) / sums
                entropies[part] = total - mean
            # The likeliest token's term of the sum is exactly 1, so no logprob is above 0.
            logprobs[part] = chosen - total
            normalizers[part] = total + peak[:, 0]
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers, entropies)
        ctx.temperature, ctx.rows = temperature, rows
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normalizers, entropies = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        dtype = normalizers.dtype
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.zeros_like(hidden) if for_hidden else None
        # Sums over chunks are in fp32, or rounding errors would grow with their number.
        weight_grad = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if for_weight else None
        bias_grad = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if for_bias else None
        logits_of = _Logits(weight, bias, ctx.temperature, dtype, min(ctx.rows, len(hidden)))
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            logs = logits_of(hidden[part]).sub_(normalizers[part, None])
            if by_entropy is None or entropies is None:
                gradient = logs.exp_()
                # d log p_y / dx_i = [i = y] - p_i
                gradient.mul_(0.0 if by_logprob is None else -by_logprob[part, None])
            else:
                probabilities = logs.exp()
                # dH/dx_i = -p_i (log p_i + H)
                gradient = logs.clamp_min_(LOWEST_LOGPROB).add_(entropies[part, None])
                gradient.mul_(by_entropy[part, None])
                if by_logprob is not None:
                    gradient.add_(by_logprob[part, None])
                gradient.mul_(probabilities).neg_()
            if by_logprob is not None:
                gradient.scatter_add_(-1, labels[part, None], by_logprob[part, None])
            if ctx.temperature != 1.0:
                gradient.div_(ctx.temperature)
            if hidden_grad is not None:
                if multiplies(weight.device, weight.dtype):
                    torch.mm(gradient.to(weight.dtype), weight, out=hidden_grad[part])
                else:
                    hidden_grad[part] = gradient @ weight.to(dtype)
            if weight_grad is not None:
                _add_product(weight_grad, gradient.t(), hidden[part])
            if bias_grad is not None:
                bias_grad.add_(gradient.sum(dim=0))
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            *([None] * 4),
        )


class _Logits:
    """Logits of a chunk divided by the temperature, in the computing dtype and in memory that is reused by the next."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype, rows: int) -> None:
        self.weight, self.bias, self.temperature, self.dtype = weight, bias, temperature, dtype
        self.memory = torch.empty(rows, len(weight), dtype=dtype, device=weight.device)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.memory[: len(hidden)]
        if self.weight.dtype != self.dtype:  # 16 bits: rounded like the layer's own product
            logits.copy_(wide_linear(hidden, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in the dtype of ``total``; ``left`` may be wider than ``right``."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    elif widens_products(right.device):
        torch.addmm(total, left.to(right.dtype), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _StatisticsByKernels(torch.autograd.Function):
    """The same with :mod:`.logit_kernels`: logits are in the weight's dtype, and read once per pass.

    Both passes go through the vocabulary. The backward pass begins with its end, whose logits are still in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        with_entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = torch.empty(len(hidden), device=hidden.device)
        normalizers, totals = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if with_entropy else None
        parts = _parts(rows * len(weight), len(hidden), len(weight))
        memory = _memory(parts, hidden)
        for part in parts:
            logit_kernels.statistics(
                _product(hidden, weight, bias, part, memory),
                labels,
                temperature=temperature,
                logprobs=logprobs,
                normalizers=normalizers,
                entropies=entropies,
                totals=totals,
                first=part.start,
                vocabulary=len(weight),
            )
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers, entropies)
        ctx.temperature, ctx.parts, ctx.memory = temperature, parts, memory
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, normalizers, entropies = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        # A sum over parts of the vocabulary is in fp32, or rounding errors would grow with their number.
        hidden_grad = torch.zeros(hidden.shape, device=hidden.device) if for_hidden else None
        weight_grad = torch.empty_like(weight) if for_weight else None
        bias_grad = torch.empty_like(bias) if for_bias else None
        memory, ctx.memory = ctx.memory, None  # gradients replace the logits: a second backward pass makes them again
        known = memory is not None
        memory = memory if known else _memory(ctx.parts, hidden)
        for part in reversed(ctx.parts):
            logits = _shaped(memory, hidden, part) if known else _product(hidden, weight, bias, part, memory)
            known = False
            logit_kernels.gradients(
                logits,
                labels,
                temperature=ctx.temperature,
                normalizers=normalizers,
                entropies=entropies,
                by_logprob=by[0],
                by_entropy=by[1],
                result=logits,
                first=part.start,
            )
            if hidden_grad is not None:
                _add_product(hidden_grad, logits, weight[part])
            if weight_grad is not None:
                torch.mm(logits.t(), hidden, out=weight_grad[part])
            if bias_grad is not None:
                bias_grad[part] = logits.sum(dim=0, dtype=torch.float32)
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad, *([None] * 4)


def _parts(elements: int, tokens: int, vocabulary: int) -> list[slice]:
    """Even parts of the vocabulary, with at most ``elements`` logits of all tokens at a time."""
    # Without tokens, which is usual for a rank with only prompt tokens, one part of everything.
    columns = max(1, min(vocabulary, elements // tokens)) if tokens else vocabulary
    tile = 256 if 256 <= columns < vocabulary else 1  # odd widths waste tiles of matrix products
    number = math.ceil(vocabulary / (columns // tile * tile))
    columns = math.ceil(vocabulary / number / tile) * tile
    return [slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]


def _memory(parts: list[slice], hidden: Tensor) -> Tensor:
    """For the logits of the largest part."""
    return torch.empty((parts[0].stop - parts[0].start) * len(hidden), dtype=hidden.dtype, device=hidden.device)


def _shaped(memory: Tensor, hidden: Tensor, part: slice) -> Tensor:
    """The logits of a part of the vocabulary in that memory."""
    columns = part.stop - part.start
    return memory[: len(hidden) * columns].view(len(hidden), columns)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice, memory: Tensor) -> Tensor:
    """``linear(hidden, weight, bias)`` of a part of the vocabulary, in memory that is reused by the next."""
    out = _shaped(memory, hidden, part)
    if bias is None:
        return torch.mm(hidden, weight[part].t(), out=out)
    return torch.addmm(bias[part], hidden, weight[part].t(), out=out)


def fused_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int = 4096,
) -> tuple[Tensor, Tensor | None]:
    """:func:`token_statistics_from_logits` of ``linear(hidden, weight, bias)``, without the whole logits.

    :param hidden: ``[N, H]``. :param weight: ``[V, H]``; may be frozen. :param bias: ``[V]`` or None.
    :param labels: ``[N]``, integers in ``[0, V)``.
    :param chunk_size: most tokens whose logits are in memory; on a GPU also between the two passes. The result does not
        depend on it.
    :return: logprobs ``[N]`` in fp32 (fp64 for fp64 hidden states), never above 0; and entropies or None.
    :raises ValueError: shapes that do not match, a temperature that is not positive, or a chunk_size below 1.
    """
    if hidden.shape[:-1] != labels.shape or hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)}, weights {tuple(weight.shape)} and labels {tuple(labels.shape)} do "
            "not fit: they need [N, H], [V, H] and [N]"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature}: logprobs need a positive one; greedy decoding has no distribution"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        cast = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    if logit_kernels.apply_to(hidden):  # the more logits there are room for, the fewer are computed again
        function, rows = _StatisticsByKernels, chunk_size
    else:
        dtype, matrices = torch.promote_types(hidden.dtype, torch.float32), 2 if with_entropy else 1
        rows = rows_in_block(chunk_size, len(weight), dtype, hidden.device, matrices=matrices)
        function = _FusedStatistics
    with torch.autocast(device, enabled=False):
        return function.apply(hidden, weight, bias, labels, float(temperature), with_entropy, rows)


# ---- in a model ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def computing(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the output layer computes ``forward``.

    The model still calls the layer as a module, so the hooks run with which FSDP2 and ZeRO-3 gather its weight before
    its forward and backward pass.
    """
    hidden_by = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if hidden_by is None:
            del head.forward
        else:
            head.forward = hidden_by


def check_plain_head(model: nn.Module, head: nn.Module | None) -> None:
    """:raises ValueError: the model's output layer is not a linear layer."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        what = "has no output layer of its own" if head is None else f"ends in a {type(head).__name__}"
        raise ValueError(
            f"--fused_linear_logprob: {type(model).__name__} {what}, and a linear layer is needed; drop the flag"
        )
