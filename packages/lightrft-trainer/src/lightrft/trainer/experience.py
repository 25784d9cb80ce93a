"""A sample with all that training needs, and batches of them.

A row is prompt + response, right-padded. ``mask[b, t]`` is True on response tokens; ``logprobs[b, t]`` belongs to
token t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Per-token values of a sample, each [response length], that become part of the batch.
TOKEN_FIELDS = ("engine_logprobs", "old_logprobs", "reference_logprobs", "advantages", "returns", "values", "entropies")


@dataclass
class Experience:
    """One sample.

    :param index: its global index within the rollout step: ``prompt position * n + sample``.
    :param prompt_index: the dataset's index of its prompt.
    :param tokens: ``[L]`` int64: prompt and response.
    :param response_length: R, the last R tokens are the response.
    :param reward: as the reward function gave it; ``shaped_reward``: after shaping.
    :param finished: the response ended with an end token, not by its length.
    :param images: what the processor made of the prompt's images, by name; empty for text.
    :param weight_version: of the weights that generated it.

    The other tensors are ``[R]`` float32, or None if the algorithm does not need them.
    """

    index: int
    prompt_index: int
    tokens: Tensor
    response_length: int
    reward: float = 0.0
    shaped_reward: float = 0.0
    finished: bool = True
    weight_version: int = 0
    engine_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    values: Tensor | None = None
    entropies: Tensor | None = None
    images: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.tokens)


@dataclass
class ExperienceBatch:
    """Rows ``[B, T]`` on the training device.

    :param tokens: int64. :param attention_mask: int64, 1 on prompt and response. :param mask: bool, True on the
        response.
    :param per_token: float32 ``[B, T]`` by name, 0 outside ``mask``; only the fields that every sample has.
    :param images: the processor's tensors, concatenated over the rows.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    per_token: dict[str, Tensor]
    images: dict[str, Tensor]

    def __getattr__(self, name: str) -> Any:
        per_token = self.__dict__.get("per_token", {})
        if name in per_token:
            return per_token[name]
        raise AttributeError(
            f"this batch has no {name}; it has {', '.join(sorted(per_token)) or 'no per-token figures'}"
        )


def make_batch(
    samples: Sequence[Experience],
    pad_token_id: int,
    device: torch.device,
    dummy_fields: Sequence[str] = TOKEN_FIELDS,
) -> ExperienceBatch:
    """Right-pad samples into one batch.

    Without samples the batch is one dummy row with an empty mask, so that a rank with nothing left can still take part
    in the forward pass of all ranks.

    :param dummy_fields: per-token values of the dummy row: those that the other ranks' samples have.
    """
    if not samples:
        tokens = torch.full((1, 2), pad_token_id, dtype=torch.long)
        empty = torch.zeros(1, 2, dtype=torch.bool)
        fields = {name: torch.zeros(1, 2, device=device) for name in dummy_fields}
        return ExperienceBatch(tokens.to(device), torch.ones_like(tokens).to(device), empty.to(device), fields, {})
    longest = max(sample.length for sample in samples)
    tokens = torch.full((len(samples), longest), pad_token_id, dtype=torch.long)
    lengths = torch.tensor([sample.length for sample in samples]).unsqueeze(1)
    responses = torch.tensor([sample.response_length for sample in samples]).unsqueeze(1)
    positions = torch.arange(longest).unsqueeze(0)
    attended = positions < lengths
    mask = attended & (positions >= lengths - responses)
    tokens[attended] = torch.cat([sample.tokens for sample in samples])
    per_token = {}
    for name in TOKEN_FIELDS:
        values = [getattr(sample, name) for sample in samples]
        if all(value is not None for value in values):
            padded = torch.zeros(len(samples), longest)
            padded[mask] = torch.cat(values).float()
            per_token[name] = padded.to(device)
    return ExperienceBatch(
        tokens.to(device), attended.long().to(device), mask.to(device), per_token, join_images(samples, device)
    )


def join_images(samples: Sequence[Experience], device: torch.device) -> dict[str, Tensor]:
    """The processor's tensors of all rows, one after the other, as Hugging Face's vision models take them.

    Where images have other sizes, or are cut into more tiles, the smaller are filled up with zeros, as a processor does
    within a batch.
    """
    joined: dict[str, list[Tensor]] = {}
    for sample in samples:
        for name, value in sample.images.items():
            joined.setdefault(name, []).append(value)
    return {name: torch.cat(_filled_up(values)).to(device) for name, values in joined.items()}


def _filled_up(values: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with equal sizes along all axes but the first; those that have them are not copied."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        room = [most - size for most, size in zip(largest, value.shape[1:], strict=True)]
        behind = [n for size in reversed(room) for n in (0, size)]
        filled.append(torch.nn.functional.pad(value, behind) if any(room) else value)
    return filled


def split_rows(values: Tensor, mask: Tensor) -> list[Tensor]:
    """The response part of each row of ``[B, T]``, as CPU float32 tensors ``[R]``."""
    flat = values.detach().float()[mask].cpu()
    return list(flat.split(mask.sum(dim=1).tolist()))


# ---- to and from a checkpoint ---------------------------------------------------------------------------------------

_NUMBERS = ("index", "prompt_index", "response_length", "reward", "shaped_reward", "finished", "weight_version")


def pack(samples: Sequence[Experience]) -> dict[str, Tensor]:
    """All samples as a few flat tensors, for a checkpoint. The inverse is :func:`unpack`, exact to the bit."""
    packed: dict[str, Tensor] = {
        "lengths": torch.tensor([sample.length for sample in samples], dtype=torch.long),
        "tokens": _cat([sample.tokens for sample in samples], torch.long),
        "numbers": torch.tensor(
            [[float(getattr(s, n)) for n in _NUMBERS] for s in samples], dtype=torch.float64
        ).reshape(len(samples), len(_NUMBERS)),
    }
    for name in TOKEN_FIELDS:
        values = [getattr(sample, name) for sample in samples]
        packed[f"has.{name}"] = torch.tensor([value is not None for value in values], dtype=torch.bool)
        packed[f"token.{name}"] = _cat([value for value in values if value is not None], torch.float32)
    for name in sorted({key for sample in samples for key in sample.images}):
        for row, sample in enumerate(samples):
            if name in sample.images:
                packed[f"image.{row}.{name}"] = sample.images[name].contiguous()
    return packed


def unpack(packed: Mapping[str, Tensor]) -> list[Experience]:
    """Samples from :func:`pack`'s tensors."""
    samples = []
    tokens = packed["tokens"].split(packed["lengths"].tolist())
    for row, (numbers, ids) in enumerate(zip(packed["numbers"].tolist(), tokens, strict=True)):
        named = dict(zip(_NUMBERS, numbers, strict=True))
        samples.append(
            Experience(
                index=int(named["index"]),
                prompt_index=int(named["prompt_index"]),
                tokens=ids.clone(),
                response_length=int(named["response_length"]),
                reward=named["reward"],
                shaped_reward=named["shaped_reward"],
                finished=bool(named["finished"]),
                weight_version=int(named["weight_version"]),
            )
        )
        prefix = f"image.{row}."
        samples[-1].images = {key[len(prefix) :]: value for key, value in packed.items() if key.startswith(prefix)}
    for name in TOKEN_FIELDS:
        owners = [sample for sample, has in zip(samples, packed[f"has.{name}"].tolist(), strict=True) if has]
        parts = packed[f"token.{name}"].split([sample.response_length for sample in owners])
        for sample, part in zip(owners, parts, strict=True):
            setattr(sample, name, part.clone())
    return samples


def _cat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(tensors)).to(dtype) if tensors else torch.zeros(0, dtype=dtype)
