"""Rows of tokens: prompt and response concatenated, padded on the right, with masks of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Prompt and response token rows, padded on the right to the longest.

    :param sequences: ``[B, T]`` int64 token ids. :param attention_mask: ``[B, T]`` int64, 1 at tokens, 0 at padding.
    :param response_mask: ``[B, T]`` bool, true at response tokens, the end token included.
    """

    sequences: Tensor
    attention_mask: Tensor
    response_mask: Tensor


def pad_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device | None = None,
) -> TokenRows:
    """Concatenate each prompt and its response, and pad on the right.

    :raises ValueError: different numbers of prompts and responses, or an empty prompt (its first response token would
        have no distribution).
    """
    if len(prompts) != len(responses):
        raise ValueError(f"pad_rows: {len(prompts)} prompts and {len(responses)} responses")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"pad_rows: prompt {index} is empty; a response needs at least one token before it")
    length = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    sequences = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(sequences)
    response_mask = torch.zeros(sequences.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        sequences[row, :end] = torch.tensor([*prompt, *response], dtype=torch.long)
        attention_mask[row, :end] = 1
        response_mask[row, len(prompt) : end] = True
    return TokenRows(sequences.to(device), attention_mask.to(device), response_mask.to(device))


def trimmed_length(attention_mask: Tensor) -> int:
    """Columns up to the last token of the longest row, at least 1."""
    used = attention_mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else min(1, attention_mask.shape[1])


def check_right_padded(attention_mask: Tensor) -> None:
    """:raises ValueError: a row has padding before a token."""
    if attention_mask.shape[1] > 1 and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError(
            "rows must be padded on the right: prompt, response, padding. A row here has padding before a token; "
            "build rows with lightrft.models.pad_rows"
        )
