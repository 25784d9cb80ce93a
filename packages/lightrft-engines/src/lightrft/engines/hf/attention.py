"""Attention for one query per row: grouped heads read each key once instead of repeating the cache for every head."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "lightrft_decode"


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention: transformers' own, except for a single masked query per row with grouped heads.

    The query heads of one group become the queries of their one key head: ``[rows, groups * heads, 1, dim]`` is read as
    ``[rows, heads, groups, dim]``. The result is the same; the keys and values are not copied.
    """
    heads = key.shape[1]
    own_masks = attention_mask is not None and attention_mask.shape[1] != 1  # Doge has one for each query head
    if query.shape[2] != 1 or query.shape[1] == heads or own_masks or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, _, _, width = query.shape
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, heads, -1, width), key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, 1, -1, value.shape[-1]), None


def install(model: Any) -> None:
    """Let the model's text layers use :func:`decode_attention` instead of SDPA."""
    text = model.config.get_text_config(decoder=True)
    # The configuration may come from the trainer's model and name the trainer's attention, which also uses SDPA.
    if text._attn_implementation.removeprefix("lightrft_") != "sdpa" or not getattr(
        model, "_supports_attention_backend", False
    ):
        return
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    text._attn_implementation = NAME
