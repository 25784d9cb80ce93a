"""What is needed of logits, as Triton kernels that read them once: logprobs and entropies, and the gradients of both.

In 16 bit a kernel computes in fp32 without an fp32 copy. The sums run block by block with the largest logit so far
taken out, as in online softmax (Milakov and Gimelshein, arXiv:1805.02867, algorithm 3).
"""

# What is decorated with triton.jit is Triton's language, not Python's.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from lightrft.strategy.device import runs_triton

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _statistics_kernel(
        logits, labels, logprobs, normalizers, entropies, stride, vocabulary, scale,
        with_entropy: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        peak, total, mean = -float("inf"), 0.0, 0.0  # mean: of the logits above the peak, weighted and not yet divided
        for start in range(0, vocabulary, block):
            columns = start + tl.arange(0, block)
            x = tl.load(logits + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32) * scale
            higher = tl.maximum(peak, tl.max(x, 0))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but masked entries so far
            shrink = tl.exp(peak - base)
            weights = tl.exp(x - base)
            if with_entropy:
                # A masked entry has the logit -inf: its term is 0, not 0 × inf.
                lowered = tl.where(total > 0.0, mean + (peak - base) * total, 0.0)
                mean = lowered * shrink + tl.sum(tl.where(weights > 0.0, weights * (x - base), 0.0), 0)
            total = total * shrink + tl.sum(weights, 0)
            peak = higher
        chosen = tl.load(logits + tl.load(labels + row)).to(tl.float32) * scale
        log_total = tl.log(total)
        # The likeliest token's term of the sum is exactly 1: no logprob is above 0.
        tl.store(logprobs + row, chosen - peak - log_total)
        tl.store(normalizers + row, peak + log_total)
        if with_entropy:
            tl.store(entropies + row, log_total - mean / total)

    @triton.jit
    def _gradients_kernel(
        logits, result, labels, normalizers, entropies, by_logprob, by_entropy, stride, width, first, scale,
        with_entropy: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        x = tl.load(logits + row * stride + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        logs = x * scale - tl.load(normalizers + row)
        probabilities = tl.exp(logs)
        # d log p_y / dx_i = [i = y] - p_i
        chosen = tl.where(columns + first == tl.load(labels + row), 1.0, 0.0)
        gradient = tl.load(by_logprob + row) * (chosen - probabilities)
        if with_entropy:
            # dH/dx_i = -p_i (log p_i + H)
            spread = tl.where(probabilities > 0.0, probabilities * (logs + tl.load(entropies + row)), 0.0)
            gradient -= tl.load(by_entropy + row) * spread
        tl.store(result + row * stride + columns, gradient * scale, mask=columns < width)


LARGEST_BLOCK = 8192


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def apply_to(tensor: Tensor) -> bool:
    """Do the kernels compute with such logits? Not in fp64, and not where Triton does not run."""
    return tensor.dtype != torch.float64 and runs_triton(tensor.device) and _has_triton()


def _block(width: int) -> int:
    return min(LARGEST_BLOCK, 1 << (width - 1).bit_length())


def statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    logprobs: Tensor,
    normalizers: Tensor,
    entropies: Tensor | None,
) -> None:
    """Write the logprob of each label, the log of the sum of exponentials, and the entropy where one is asked for.

    :param logits: ``[N, V]``, rows contiguous; divided by the temperature. :param labels: ``[N]`` int64.
    :param logprobs: fp32 ``[N]``, as ``normalizers`` and ``entropies``; written.
    """
    count, vocabulary = logits.shape
    if not count:
        return
    _statistics_kernel[(count,)](
        *(logits, labels, logprobs, normalizers, logprobs if entropies is None else entropies),
        *(logits.stride(0), vocabulary, 1.0 / temperature),
        with_entropy=entropies is not None,
        block=_block(vocabulary),
        num_warps=8,
    )


def gradients(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    normalizers: Tensor,
    entropies: Tensor | None,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    result: Tensor,
    first: int = 0,
) -> None:
    """Write the gradient of the statistics by the logits.

    :param logits: ``[N, W]``: columns of the vocabulary from ``first`` on. :param labels: ``[N]``, into all of it.
    :param by_logprob: ``[N]``, the gradient of what is minimised by each logprob; ``by_entropy`` likewise.
    :param result: ``[N, W]``, strides as the logits', which it may be.
    """
    count, width = logits.shape
    if not count:
        return
    by_logprob = torch.zeros_like(normalizers) if by_logprob is None else by_logprob.contiguous()
    if by_entropy is None or entropies is None:
        with_entropy, entropies, by_entropy = False, normalizers, by_logprob
    else:
        with_entropy, by_entropy = True, by_entropy.contiguous()
    block = min(1024, _block(width))
    _gradients_kernel[(count, triton.cdiv(width, block))](
        *(logits, result, labels, normalizers, entropies, by_logprob, by_entropy),
        *(logits.stride(0), width, first, 1.0 / temperature),
        with_entropy=with_entropy,
        block=block,
        num_warps=4,
    )
