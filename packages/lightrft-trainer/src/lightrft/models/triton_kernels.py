"""The kernels of :mod:`.logit_kernels`, in their own module because importing Triton takes 0.4 s."""

# Functions decorated with triton.jit are in Triton's language, not Python.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def statistics_kernel(
    logits, labels, logprobs, normalizers, entropies, totals, stride, width, first, scale,
    begins: tl.constexpr, ends: tl.constexpr, with_entropy: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per row of logits; see :func:`.logit_kernels.statistics`.

    Until the last part of the vocabulary the results hold what is known so far: the label's logit, the largest logit
    and, for the entropy, the mean of the logits above it, weighted and not yet divided by the total.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    chosen, peak, total, mean = 0.0, -float("inf"), 0.0, 0.0
    if not begins:
        chosen, peak, total = tl.load(logprobs + row), tl.load(normalizers + row), tl.load(totals + row)
        if with_entropy:
            mean = tl.load(entropies + row)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        x = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32) * scale
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
    column = tl.load(labels + row) - first
    here = (column >= 0) & (column < width)
    chosen = tl.where(here, tl.load(logits + column, mask=here, other=0.0).to(tl.float32) * scale, chosen)
    if ends:
        log_total = tl.log(total)
        # The likeliest token's term of the sum is exactly 1: no logprob is above 0.
        tl.store(logprobs + row, chosen - peak - log_total)
        tl.store(normalizers + row, peak + log_total)
        if with_entropy:
            tl.store(entropies + row, log_total - mean / total)
    else:
        tl.store(logprobs + row, chosen)
        tl.store(normalizers + row, peak)
        tl.store(totals + row, total)
        if with_entropy:
            tl.store(entropies + row, mean)


@triton.jit
def gradients_kernel(
    logits, result, labels, normalizers, entropies, by_logprob, by_entropy, stride, result_stride, width, first,
    scale, with_entropy: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per block of a row; see :func:`.logit_kernels.gradients`."""
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
    tl.store(result + row * result_stride + columns, gradient * scale, mask=columns < width)
