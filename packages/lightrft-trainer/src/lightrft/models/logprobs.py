"""Token logprobs and entropies from logits, without a second copy of the logits.

For N tokens and a vocabulary of V, PyTorch's ``log_softmax`` keeps N × V numbers for the backward pass besides
the logits, and another N × V in fp32 if the logits are bf16. Here only the logits are kept, and both passes go through
chunks of rows; the backward pass allocates only its result, N × V. On a GPU each is one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import logit_kernels

CHUNK_BYTES = 8 * 2**20
"""Size of one chunk in the computing dtype: small enough to stay in a CPU's cache, large enough to fill a GPU."""


LOWEST_LOGPROB = -1e30
"""Stands for a masked token's -inf: its probability is 0, and times that and any gradient this is 0, not nan."""


def _rows_in_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    budget = CHUNK_BYTES if device.type == "cpu" else 64 * CHUNK_BYTES
    return max(1, budget // (vocabulary * dtype.itemsize))


def _scaled(rows: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """The rows themselves if nothing is to be done."""
    rows = rows.to(dtype)
    return rows if temperature == 1.0 else rows / temperature


class _TokenStatistics(torch.autograd.Function):
    """Logprobs ``[N]`` and entropies ``[N]`` of logits ``[N, V]`` that are divided by a temperature."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        count, vocabulary = logits.shape
        logprobs = torch.empty(count, dtype=dtype, device=logits.device)
        entropies = torch.empty_like(logprobs) if with_entropy else None
        ctx.temperature = temperature
        if logit_kernels.apply_to(logits):
            normalizers = torch.empty_like(logprobs)
            logit_kernels.statistics(
                *(logits, labels),
                temperature=temperature,
                logprobs=logprobs,
                normalizers=normalizers,
                entropies=entropies,
            )
            ctx.save_for_backward(logits, labels, entropies, normalizers)
            return logprobs, entropies
        step = _rows_in_chunk(vocabulary, dtype, logits.device)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            normalized = torch.log_softmax(_scaled(logits[rows], dtype, temperature), dim=-1)
            logprobs[rows] = normalized.gather(-1, labels[rows, None])[:, 0]
            if entropies is not None:
                # A masked token has the logprob -inf: its term is 0, not 0 × inf.
                entropies[rows] = -normalized.exp().mul_(normalized.clamp_min_(torch.finfo(dtype).min)).sum(-1)
        ctx.save_for_backward(logits, labels, entropies, None)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, labels, entropies, normalizers = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # Contiguous even for transposed logits: a kernel writes contiguous rows.
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if normalizers is not None:
            logit_kernels.gradients(
                *(logits, labels),
                temperature=ctx.temperature,
                normalizers=normalizers,
                entropies=entropies,
                by_logprob=by_logprob,
                by_entropy=by_entropy,
                result=result,
            )
            return result, None, None, None
        step = _rows_in_chunk(logits.shape[1], dtype, logits.device)
        for start in range(0, logits.shape[0], step):
            rows = slice(start, start + step)
            scaled = _scaled(logits[rows], dtype, ctx.temperature)
            if by_entropy is None or entropies is None:
                # Directly into its place, if the dtypes allow it.
                gradient = torch.softmax(scaled, dim=-1, out=result[rows] if logits.dtype == dtype else None)
                # d log p_y / dx_i = [i = y] - p_i
                gradient.mul_(0.0 if by_logprob is None else -by_logprob[rows, None])
            else:
                normalized = torch.log_softmax(scaled, dim=-1)
                probabilities = normalized.exp()
                # dH/dx_i = -p_i (log p_i + H)
                gradient = normalized.clamp_min_(LOWEST_LOGPROB).add_(entropies[rows, None])
                gradient.mul_(by_entropy[rows, None])
                if by_logprob is not None:
                    gradient.add_(by_logprob[rows, None])
                gradient.mul_(probabilities).neg_()
            if by_logprob is not None:
                gradient.scatter_add_(-1, labels[rows, None], by_logprob[rows, None])
            if ctx.temperature != 1.0:
                gradient.div_(ctx.temperature)
            if gradient.data_ptr() != result[rows].data_ptr():
                result[rows] = gradient
        return result, None, None, None


def token_statistics_from_logits(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logprob of each label, and the entropy of the distribution that it was drawn from, in nats.

    :param logits: ``[..., V]``, any floating dtype; not changed.
    :param labels: ``[...]``, integers in ``[0, V)``.
    :param temperature: divides the logits first; the distribution is the one that a sampler at this temperature draws
        from.
    :param with_entropy: also compute entropies; both results carry gradients.
    :return: ``[...]`` in fp32 (fp64 for fp64 logits), and the same or None.
    :raises ValueError: shapes that do not match, or a temperature that is not positive.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: labels need "
            f"{tuple(logits.shape[:-1])}"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature}: logprobs need a positive one; greedy decoding has no distribution"
        )
    flat = logits.reshape(-1, logits.shape[-1])
    logprobs, entropies = _TokenStatistics.apply(flat, labels.reshape(-1), float(temperature), with_entropy)
    return logprobs.view(labels.shape), None if entropies is None else entropies.view(labels.shape)


def logprobs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Logprob of each label; see :func:`token_statistics_from_logits`."""
    return token_statistics_from_logits(logits, labels, temperature=temperature)[0]


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of each distribution; see :func:`token_statistics_from_logits`."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    entropies = token_statistics_from_logits(logits, labels, temperature=temperature, with_entropy=True)[1]
    assert entropies is not None
    return entropies
