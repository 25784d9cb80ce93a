"""Triton kernels that read logits once: logprobs and entropies, and the gradients of both.

With 16-bit logits a kernel computes in fp32 without an fp32 copy. Sums are made block by block relative to the largest
logit so far, as in online softmax (Milakov and Gimelshein, arXiv:1805.02867, algorithm 3).
"""

# A Triton kernel also takes its launcher's arguments, such as num_warps.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightrft.strategy.device import runs_triton

LARGEST_BLOCK = 2048


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def apply_to(tensor: Tensor) -> bool:
    """Whether the kernels support such logits: not in fp64, and not without Triton."""
    return tensor.dtype != torch.float64 and runs_triton(tensor.device) and _has_triton()


def _block(width: int) -> int:
    return min(LARGEST_BLOCK, 1 << (width - 1).bit_length())


def _dense(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels with contiguous rows, as the kernels need them; a copy only if necessary."""
    return logits if logits.stride(1) == 1 else logits.contiguous(), labels.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton starts a kernel on the current device, whichever the tensors are on."""
    return torch.accelerator.device_index(tensor.device.index)


def statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    logprobs: Tensor,
    normalizers: Tensor,
    entropies: Tensor | None,
    totals: Tensor | None = None,
    first: int = 0,
    vocabulary: int | None = None,
) -> None:
    """Write the logprob of each label, the log of the sum of exponentials, and the entropy if requested.

    :param logits: ``[N, W]``: columns of the vocabulary from ``first`` on; divided by the temperature. :param labels:
        ``[N]`` int64, into all of it. Both of any strides.
    :param logprobs: fp32 ``[N]``, as ``normalizers`` and ``entropies``; written.
    :param totals: fp32 ``[N]``, needed where the columns are a part: the parts are given in their order with the same
        memory, and the results are there with the last one.
    :param vocabulary: columns in all; None: these are all.
    """
    count, width = logits.shape
    if not count:
        return
    logits, labels = _dense(logits, labels)
    from .triton_kernels import statistics_kernel

    with _device_of(logits):
        statistics_kernel[(count,)](
            *(logits, labels, logprobs, normalizers),
            *(logprobs if memory is None else memory for memory in (entropies, totals)),
            *(logits.stride(0), width, first, 1.0 / temperature),
            begins=first == 0,
            ends=vocabulary is None or first + width == vocabulary,
            with_entropy=entropies is not None,
            block=_block(width),
            num_warps=4,
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
    :param result: ``[N, W]``, with contiguous rows; it may be the logits themselves.
    """
    count, width = logits.shape
    if not count:
        return
    by_logprob = torch.zeros_like(normalizers) if by_logprob is None else by_logprob.contiguous()
    if by_entropy is None or entropies is None:
        with_entropy, entropies, by_entropy = False, normalizers, by_logprob
    else:
        with_entropy, by_entropy = True, by_entropy.contiguous()
    logits, labels = _dense(logits, labels)
    from .triton_kernels import gradients_kernel

    block = _block(width)
    with _device_of(logits):
        gradients_kernel[(count, -(-width // block))](
            *(logits, result, labels, normalizers, entropies, by_logprob, by_entropy),
            *(logits.stride(0), result.stride(0), width, first, 1.0 / temperature),
            with_entropy=with_entropy,
            block=block,
            num_warps=4,
        )
