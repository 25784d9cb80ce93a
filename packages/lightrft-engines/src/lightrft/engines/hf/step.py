"""One decoding step of a model: one token for every row, with the cache that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .cache import SlotCache


@dataclass(frozen=True, kw_only=True)
class DecoderModel:
    """A causal language model, with what the decoding loop must know about it.

    :param cache_argument: name under which its forward takes the cache.
    :param plain: all layers keep keys and values by position, so rows of any lengths share a batch.
    :param window: sliding window of the layers that have one. :param mixed: other layers have none.
    """

    model: Any
    device: torch.device
    dtype: torch.dtype
    cache_argument: str = "past_key_values"
    plain: bool = True
    window: int | None = None
    mixed: bool = False


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What one step reads.

    :param ids: the last tokens, int64 ``[rows, 1]``.
    :param positions: theirs, int64 ``[rows, 1]``, or ``[3, rows, 1]`` with images.
    :param places: where the cache takes each row's keys and values, int64 ``[rows]`` (:meth:`SlotCache.places`).
    :param masks: added to attention scores, ``[rows, slots]`` for all layers; or two, for layers without and with a
        sliding window.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    masks: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.ids, self.positions, self.places, *self.masks)

    def clone(self) -> StepInputs:
        """The same values in memory of their own."""
        return StepInputs(
            ids=self.ids.clone(),
            positions=self.positions.clone(),
            places=self.places.clone(),
            masks=tuple(mask.clone() for mask in self.masks),
        )


def forward(m: DecoderModel, memory: SlotCache, inputs: StepInputs) -> torch.Tensor:
    """The logits ``[rows, vocabulary]`` after each row's last token, whose keys and values go into ``memory``."""
    masks = [mask[:, None, None] for mask in inputs.masks]
    memory.aim(inputs.places, masks[0].shape[-1])
    return decode(
        m,
        memory,
        inputs.ids,
        inputs.positions,
        masks[0] if len(masks) == 1 else {"full_attention": masks[0], "sliding_attention": masks[1]},
    )


def decode(m: DecoderModel, cache: Any, ids: torch.Tensor, positions: torch.Tensor, mask: Any) -> torch.Tensor:
    """The same with any cache of transformers and a mask as its models take it."""
    out = m.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=1,
        **{m.cache_argument: cache},
    )
    return out.logits[:, -1]
