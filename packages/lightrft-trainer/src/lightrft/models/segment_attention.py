"""Attention within segments of rows: with SDPA, or with one variable-length kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from inspect import signature
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.strategy.device import attends_in_segments


def attend_in_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...], *, kernel: str, dropout: float, **options: Any
) -> Tensor:
    """``[R, heads, L, width]``, in which each token attends only to its own segment.

    :param key: its number of heads divides the query's. :param segments: lengths that add up to L.
    :param kernel: ``flash_attention_2``, or ``sdpa``, which uses torch's variable-length kernel if there is one.
    :param options: ``scaling`` (None: by the width), ``window`` (size of a sliding window, or None),
        ``causal``.
    """
    if kernel == "flash_attention_2":
        return _varied(_flash, query, key, value, segments, dropout=dropout, **options)
    if _torch_varies(query, value, segments, dropout):
        return _varied(_torch_flash, query, key, value, segments, **options)
    return _in_segments(query, key, value, segments, dropout=dropout, **options)


def _in_segments(query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...], **options: Any) -> Tensor:
    """With SDPA; neighbouring segments of equal length are computed as a batch."""
    if len(segments) == 1:
        return sdpa(query, key, value, **options)
    out, runs = [], [(length, len(list(run))) for length, run in groupby(segments)]
    sizes = [length * count for length, count in runs]
    parts = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
    for (length, count), part in zip(runs, parts, strict=True):
        # [R, heads, count * length, width] as [R * count, heads, length, width], and back
        rows = (each.unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for each in part)
        found = sdpa(*rows, **options).unflatten(0, (-1, count))
        out.append(found.transpose(1, 2).flatten(2, 3))
    return torch.cat(out, dim=2)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    """Attention within one segment."""
    length, grouped = query.shape[2], query.shape[1] // key.shape[1]
    mask = None
    if causal and window is not None and window < length:
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        mask, causal = (distance >= 0) & (distance < window), False
    native = query.device.type != "cpu" and mask is None  # there grouped heads are slow
    if grouped > 1 and not native:
        key, value = (part.repeat_interleave(grouped, dim=1) for part in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal,
        enable_gqa=grouped > 1 and native,
    )


# ---- kernels of variable lengths -------------------------------------------------------------------------------------
def _varied(
    kernel: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    *,
    window: int | None,
    causal: bool,
    **options: Any,
) -> Tensor:
    """Attention within each segment, with one kernel for tokens ``[T, heads, width]`` and the segments' ends."""
    rows, _, length, _ = query.shape
    lengths = segments * rows
    ends = _ends(lengths, query.device)
    flat = [part.transpose(1, 2).reshape(rows * length, part.shape[1], -1) for part in (query, key, value)]
    before, after = (-1, -1) if window is None else (window - 1, window - 1)
    seen = (before, 0 if causal else after)
    return kernel(*flat, ends, max(lengths), seen, **options).view(rows, length, query.shape[1], -1).transpose(1, 2)


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The start of each segment, and the end of the last one; cached, since all layers need the same."""
    return torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    seen: tuple[int, int],
    *,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The kernel of the package flash-attn."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    device = query.device.type
    if torch.is_autocast_enabled(device):  # the rotation has made queries and keys fp32, and the kernel does not cast
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    # It needs values as wide as keys; zeros add nothing.
    width, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing:
        value = nn.functional.pad(value, (0, missing))
    out = flash_attn_varlen_func(
        *(query, key, value),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=seen[1] == 0,
        window_size=seen,
    )
    return out[..., :width]


def _torch_varies(query: Tensor, value: Tensor, segments: tuple[int, ...], dropout: float) -> bool:
    """Whether torch's variable-length kernel supports this.

    It has no dropout, no heads wider than 256, and no values of another width than the keys.
    """
    width = query.shape[-1]
    if len(segments) == 1 or dropout or width > 256 or width % 8 or value.shape[-1] != width:
        return False
    return attends_in_segments(query.device, query.dtype)


def _torch_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    seen: tuple[int, int],
    *,
    scaling: float | None,
) -> Tensor:
    """Torch's own kernel, which needs no further package."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = _grouped(varlen_attn)
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=seen, **grouped)
    assert isinstance(out, Tensor)
    return out


@cache
def _grouped(varlen_attn: Callable[..., Any]) -> dict[str, Any]:
    """Later versions of torch need a flag for grouped heads."""
    return {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
