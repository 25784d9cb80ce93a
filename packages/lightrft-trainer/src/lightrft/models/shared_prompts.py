"""Samples with the same prompt, for which the prompt is computed only once: all of them use its keys and values.

A token's hidden state depends only on the tokens before it, so a prompt's are the same in each of its samples, and
their gradients add up. The rows become one row: the prompts, then each sample's own part, which starts with the
prompt's last token, whose successor differs, and ends with the last token that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .row_layout import Tally

WORTHWHILE = 0.8
"""Share of the tokens up to which computing prompts once pays for bringing keys to the samples."""
LARGEST_MASK = 2**24  # elements, for all parts together: 64 MiB in fp32
FREE_PADDING = 512  # fewer padded queries than this cost less than another call of attention
PADDING_SHARE = 0.25
# Families in transformers whose layers mix tokens only by attention and that are covered by tests.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"})


def can_share(model: Any) -> bool:
    """Whether a model's results are the same if samples share their prompt."""
    text = model.config.get_text_config(decoder=True)
    own_code = any(kind.__module__.startswith("transformers.models.") for kind in type(model).__mro__)
    return (
        own_code
        and text is model.config
        and text.model_type in FAMILIES
        and text._attn_implementation.removeprefix("lightrft_") == "sdpa"
    )


def has_dropout(model: nn.Module) -> bool:
    """Whether training passes are random: samples that share a prompt would share its dropout."""
    config: Any = model.config
    layers = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return bool(getattr(config, "attention_dropout", 0.0)) or any(layers)


class Padding:
    """Segments of a flat row as rows of one width, and back.

    :param lengths: of the segments, one after the other.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.width, self.tokens = len(lengths), max(lengths), sum(lengths)
        self.places: Tensor | None = None  # a view is enough
        if min(lengths) < self.width:
            each = torch.tensor(lengths)[:, None]
            there = torch.arange(self.width) < each
            starts = each.cumsum(0) - each
            self.sources = (starts + torch.arange(self.width)).masked_fill_(~there, 0).flatten().to(device)
            self.places, self.holes = (part.flatten().nonzero()[:, 0].to(device) for part in (there, ~there))

    def fill(self, flat: Tensor) -> Tensor:
        """``[rows, width, ...]``, with arbitrary values after the end of a segment."""
        if self.places is not None:
            flat = _Fill.apply(flat, self)
        return flat.unflatten(0, (self.rows, self.width))

    def drain(self, filled: Tensor) -> Tensor:
        """The segments of ``[rows, width, ...]``."""
        flat = filled.flatten(0, 1)
        return flat if self.places is None else _Drain.apply(flat, self)


class _Fill(torch.autograd.Function):
    """Each token is in one place only, so that gradients are indexed instead of accumulated."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return flat.index_select(0, padding.sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.padding.places), None


class _Drain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, padding: Padding) -> Tensor:
        assert padding.places is not None, "else there is nothing to drain"
        ctx.padding = padding
        return flat.index_select(0, padding.places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.padding.sources).index_fill_(0, ctx.padding.holes, 0), None


@dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring segments of similar lengths, for one call of attention.

    :param segments: their numbers among the prompts, or among the samples. :param context: for samples, the tokens
        of each one's prompt.
    """

    segments: slice
    padding: Padding
    context: tuple[int, ...] = ()

    @property
    def seen(self) -> tuple[int, ...]:
        """``context``, or a single one if all are equal: a mask for each."""
        return self.context[:1] if len(set(self.context)) == 1 else self.context


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """How rows ``[B, T]`` become one row ``[1, L]``: prompts first, then the samples' own parts.

    :param shape: of the rows. :param index: ``[L]`` int64, the place of each token in the flattened rows.
    :param prompts: their lengths. :param own: lengths of the samples' own parts, each of which
        sees the prompt numbered in ``prompt_of``.
    :param attended: number of layers that have used it.
    """

    shape: torch.Size
    index: Tensor
    prompts: tuple[int, ...]
    own: tuple[int, ...]
    prompt_of: tuple[int, ...]
    attended: Tally = field(default_factory=Tally, repr=False)
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokens: Tensor, asked: Tensor, *, at_most: float) -> SharedPrompts | None:
        """The layout of a batch; None if it would have more than ``at_most`` tokens.

        :param tokens: ``[B, T]``, padded on the right. :param asked: ``[B, T]`` bool, positions whose results are
            needed.
        """
        columns = torch.arange(1, tokens.shape[1] + 1, device=asked.device)
        marked = asked * columns
        starts, ends = torch.where(asked, marked, tokens.shape[1] + 1).amin(1) - 1, marked.amax(1)
        rows, starts, ends = tokens.tolist(), starts.tolist(), ends.tolist()
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end == 0:  # nothing is needed: one token, so that every parameter gets a gradient
                starts[row], ends[row] = start, end = 0, 1
            groups.setdefault(tuple(rows[row][:start]), []).append(row)
        own = [end - start for start, end in zip(starts, ends, strict=True)]
        if sum(map(len, groups)) + sum(own) > at_most:
            return None
        prompts = sorted(groups.values(), key=lambda group: starts[group[0]])
        number = {row: place for place, group in enumerate(prompts) for row in group}
        samples = sorted(number, key=lambda row: (own[row], number[row]))
        width = tokens.shape[1]
        spans = [(group[0] * width, starts[group[0]]) for group in prompts]
        spans += [(row * width + starts[row], own[row]) for row in samples]
        return cls(
            shape=tokens.shape,
            index=torch.cat([torch.arange(at, at + length) for at, length in spans]).to(tokens.device),
            prompts=tuple(starts[group[0]] for group in prompts),
            own=tuple(own[row] for row in samples),
            prompt_of=tuple(number[row] for row in samples),
        )

    def place(self, values: Tensor) -> Tensor:
        """``[..., B, T]`` values of tokens as ``[..., 1, L]``."""
        return values.flatten(-2)[..., self.index].unsqueeze(-2)

    def restore(self, values: Tensor) -> Tensor:
        """``[1, L]`` values as ``[B, T]``, 0 where a token is not in the row's own part."""
        flat = torch.zeros(self.shape.numel(), dtype=values.dtype, device=values.device)
        return flat.index_copy(0, self.index, values[0]).view(self.shape)

    # ---- attention ---------------------------------------------------------------------------------------------------
    @cached_property
    def parts(self) -> list[Part]:
        """The prompts' parts, then the samples'."""
        device, context = self.index.device, tuple(self.prompts[prompt] for prompt in self.prompt_of)
        some = tuple(length for length in self.prompts if length)  # nothing to share in a prompt of one token
        return [Part(rows, Padding(some[rows], device)) for rows in alike(some)] + [
            Part(rows, Padding(self.own[rows], device), context[rows]) for rows in alike(self.own)
        ]

    @cached_property
    def all_prompts(self) -> Padding:
        """All prompts as rows, to be selected by the samples."""
        return Padding(self.prompts, self.index.device)

    @cached_property
    def sources(self) -> Tensor:
        """``prompt_of`` as a tensor."""
        return torch.tensor(self.prompt_of, device=self.index.device)

    def mask_elements(self, groups: int) -> int:
        """Size of all masks; ``groups`` as in :meth:`mask`."""
        return sum(
            len(part.seen) * groups * part.padding.width * (max(part.context) + part.padding.width)
            for part in self.parts
            if part.context
        )

    def mask(self, part: Part, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """What the samples of a part see: ``[samples or 1, 1, groups * queries, context + queries]``, 0 or -inf."""
        key = (part.segments.start, window, groups, dtype)
        if key not in self._masks:
            context = torch.tensor(part.seen, device=self.index.device)[:, None, None]
            before = torch.arange(max(part.context), device=context.device)
            queries = torch.arange(part.padding.width, device=context.device)
            to_context = (context + queries[:, None] - before).masked_fill(before >= context, -1)
            to_own = (queries[:, None] - queries).expand(len(context), -1, -1)
            distance = torch.cat([to_context, to_own], dim=2)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=context.device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = mask.repeat(1, groups, 1)[:, None]
        return self._masks[key]


def alike(lengths: Sequence[int]) -> list[slice]:
    """Split ascending lengths into runs that may be padded to one length."""
    runs: list[slice] = []
    start = real = 0
    for end, length in enumerate(lengths, 1):
        padding = length * (end - start) - real - length
        if end - start > 1 and padding > max(FREE_PADDING, PADDING_SHARE * (real + length)):
            runs.append(slice(start, end - 1))
            start, real = end - 1, 0
        real += length
    return [*runs, slice(start, len(lengths))] if lengths else []
