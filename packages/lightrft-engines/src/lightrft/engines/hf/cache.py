"""The KV cache of a decoding batch, written in place, and that of a prefill.

Rows start at slot 0 and grow to the right, each with its own length: prompts need no left padding, another row can take
a finished one's place, and a decoding step writes one slot per row instead of copying the whole cache.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ROUND = 64  # capacities are multiples of this, which keeps masks aligned for fused kernels


class Prefill(Cache):
    """Keeps the keys and values of one forward pass over whole prompts; ``layers`` stays empty."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.caught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer_idx == len(self.caught), "layers come in order, each once"
        self.caught.append((key_states, value_states))
        return key_states, value_states

    def __bool__(self) -> bool:
        return True  # ``layers`` is empty, and a model may ask whether there is a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class SlotCache(Cache):
    """Keys and values of all rows, ``[rows, capacity, heads, head_dim]`` for each layer.

    Memory is kept between generations and grows when it must.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.stores: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rows = self.capacity = self.length = 0
        self.layout = 0  # counts how often the stores moved to other memory
        self.asked = False  # whether a model asked for a length since this was last cleared
        self._starts = self._places = torch.empty(0, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.stores)

    def drop(self) -> int:
        """Free everything; returns the bytes."""
        freed = self.nbytes
        self.stores, self.rows, self.capacity = [], 0, 0
        self.layout += 1
        return freed

    def reserve(self, rows: int, capacity: int, living: int) -> None:
        """Make room for ``rows`` rows of ``capacity`` slots; the first ``living`` rows keep their content."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        old_rows, old_capacity = self.rows, self.capacity
        self.rows = max(rows, old_rows if living else 0)
        self.capacity = _round_up(max(capacity, old_capacity if living else 0))
        self._starts = torch.empty(0, dtype=torch.int64)
        self.layout += 1
        old, self.stores = self.stores, []
        if living:
            old.reverse()
            while old:  # layer by layer, so that only one layer is held twice
                pair = old.pop()
                grown = [t.new_zeros((self.rows, self.capacity, *t.shape[2:])) for t in pair]
                for new, was in zip(grown, pair, strict=True):
                    new[:living, :old_capacity] = was[:living]
                self.stores.append((grown[0], grown[1]))

    def admit(self, prefill: Prefill, first_row: int, source: torch.Tensor) -> None:
        """Copy prompts into rows ``first_row ...``; row i takes prompt ``source[i]`` (int64) of the prefill.

        The rows' other slots are zeroed: masked slots still enter as 0 x value, and 0 x NaN is NaN.
        """
        rows = slice(first_row, first_row + source.numel())
        for layer, fresh in enumerate(prefill.caught):
            if layer == len(self.stores):
                keys, values = (t.new_zeros((self.rows, self.capacity, t.shape[1], t.shape[3])) for t in fresh)
                self.stores.append((keys, values))
            for store, new in zip(self.stores[layer], fresh, strict=True):
                length = new.shape[2]
                store[rows, :length] = new.transpose(1, 2)[source]
                store[rows, length:].zero_()

    def move(self, holes: torch.Tensor, movers: torch.Tensor, length: int) -> None:
        """Rows ``movers`` take the places ``holes`` (int64 each); ``length`` slots are in use."""
        for keys, values in self.stores:
            keys[holes, :length] = keys[movers, :length]
            values[holes, :length] = values[movers, :length]

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Slot ``slots[i]`` of row i, counted over all rows (int64 ``[rows]`` each)."""
        if self._starts.numel() != slots.numel():
            self._starts = torch.arange(slots.numel(), device=slots.device) * self.capacity
        return self._starts + slots

    def aim(self, places: torch.Tensor, length: int) -> None:
        """Before a step: where each row writes (:meth:`places`); attention sees ``length`` slots."""
        self._places, self.length = places, length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.stores[layer_idx]
        rows = key_states.shape[0]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self._places, key_states.squeeze(2))
        values.view(-1, *values.shape[2:]).index_copy_(0, self._places, value_states.squeeze(2))
        return keys[:rows, : self.length].transpose(1, 2), values[:rows, : self.length].transpose(1, 2)

    def __bool__(self) -> bool:
        return True  # ``layers`` is empty, and a model may ask whether there is a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self.asked = True
        return self.length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.asked = True
        return self.length, 0


def attention_windows(model: Any) -> tuple[bool, int | None, bool]:
    """The kind of cache that a model needs: (plain, window, mixed).

    ``plain``: every layer keeps keys and values of all positions, or of a window, and accepts our mask, so that
    :class:`SlotCache` works. Models with a recurrent state or distance biases are not plain.
    ``window``: the sliding window of those layers that have one. ``mixed``: only some layers have one.
    """
    config = model.config
    layers = DynamicCache(config=config).layers
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    windows = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    plain = plain and bool(getattr(model, "_supports_attention_backend", False))
    plain = plain and "chunked_attention" not in types and len(windows) <= 1
    mixed = bool(windows) and any(type(layer) is DynamicLayer for layer in layers)
    return plain, next(iter(windows), None), mixed


def _round_up(count: int) -> int:
    return -(-count // _ROUND) * _ROUND
