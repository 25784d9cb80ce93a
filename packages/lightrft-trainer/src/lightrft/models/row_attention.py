"""Attention that knows how rows are laid out: samples of a packed row do not see each other, ranks exchange heads.

It is called through transformers' attention interface, so that no model's code is changed. A model that gets a
:class:`~lightrft.models.row_layout.RowLayout` passes it to each of its layers, also when gradient checkpointing runs
them again; a call without one is transformers' own attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .row_layout import RowLayout, SequenceRanks
from .segment_attention import attend_in_segments, sdpa
from .shared_prompts import SharedPrompts

# The kernel of our attention, by the name of the model's implementation.
KERNELS = {"sdpa": "sdpa", "eager": "sdpa", "flash_attention_2": "flash_attention_2"}
# Layers that mix tokens only by attention, which is replaced here.
LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
# Names under which configurations have each layer's type.
LAYER_TYPE_NAMES = ("layer_types", "layers_block_type", "block_types")
# Variants of attention that change the result and are not supported here.
REFUSED = ("position_bias", "s_aux", "softcap")
# A mask that transformers passes on instead of making one; it is not read.
NO_MASK = torch.ones(1, 1, 1, 1)


def install(model: Any, flag: str) -> None:
    """Let the model's text layers attend by a row layout.

    :param flag: the flag that needs it, for the message.
    :raises ValueError: the model mixes tokens in a way that would let packed samples see each other.
    """
    text, name = model.config.get_text_config(decoder=True), type(model).__name__
    implementation = text._attn_implementation
    if implementation.removeprefix("lightrft_") in KERNELS.values():
        implementation = implementation.removeprefix("lightrft_")
    named = {layer for names in LAYER_TYPE_NAMES for layer in getattr(text, names, None) or ()}
    others = sorted(named - LAYER_TYPES)
    if others:
        raise ValueError(
            f"{flag}: {name} has {', '.join(others)} layers, which carry state from one sample of a row to the next; "
            "drop the flag"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{flag}: {name} computes attention itself, over whole rows, so that the samples of a row would see "
            "each other; drop the flag"
        )
    if any(map(_offsets_positions, model.modules())):
        raise ValueError(
            f"{flag}: {name} counts positions from its padding token, and not from 0 as they are given here; "
            "drop the flag"
        )
    if implementation not in KERNELS:
        raise ValueError(
            f"{flag}: attention implementation {implementation!r} would let the samples of a row see each other; load "
            f"{name} with one of {', '.join(KERNELS)}, or drop the flag"
        )
    text._attn_implementation = _register(KERNELS[implementation])


def _offsets_positions(module: nn.Module) -> bool:
    """Whether position embeddings have a padding index, as RoBERTa's."""
    table = getattr(module, "position_embeddings", None)
    learned = isinstance(table, nn.Embedding) and table.padding_idx is not None
    return learned or hasattr(module, "create_position_ids_from_input_ids")


def check_attended(model: Any, layout: RowLayout | SharedPrompts) -> None:
    """Check, after a forward pass, that every layer has attended by the layout.

    :raises ValueError: some mix tokens in another way, in which samples of a row see each other.
    """
    known = layout.attended.total
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", known)
    if known != layers:
        raise ValueError(
            f"{type(model).__name__} has {layers} layers, and attention knew {known} times how its row is laid out: "
            "other layers carry something from one sample of a row to the next; drop --packing_samples and --sp_size"
        )


def check_heads(model: Any, ranks: SequenceRanks, flag: str = "--sp_size") -> None:
    """:raises ValueError: the attention heads cannot be split evenly; names the possible sizes."""
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    if heads % ranks.size:
        possible = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise ValueError(
            f"{flag} {ranks.size}: {type(model).__name__} has {heads} attention heads, which {ranks.size} ranks cannot "
            f"share; possible are {possible}"
        )


def _register(kernel: str) -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = f"lightrft_{kernel}"
    AttentionInterface.register(name, partial(attend, kernel=kernel))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    kernel: str,
    row_layout: RowLayout | SharedPrompts | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``[R, L, heads, width]`` from ``[R, heads, L, width]``, L being this rank's part of a row.

    :raises ValueError: the model needs a variant of attention that is not supported here, or does not pass the layout
        of its row to this layer.
    """
    if row_layout is None:
        # By shape, since strategies cast and move the mask. For one token real masks have it too, and hide nothing.
        unread = attention_mask is not None and attention_mask.shape == NO_MASK.shape
        if unread and (query.shape[2] > 1 or key.shape[2] > 1):
            raise ValueError(
                f"{type(module).__name__} was not told how its row is laid out, because the model's own code keeps "
                "keywords from it, so that packed samples would see each other and ranks would not share a sequence; "
                "drop --packing_samples and --sp_size"
            )
        from transformers import AttentionInterface

        own = AttentionInterface()[kernel]
        options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        seen: Any = module
        # It loads the implementation that the layer's configuration names, which is not ours.
        if kernel == "flash_attention_2":
            seen = _Standin(module, config=_Standin(module.config, _attn_implementation=kernel))
        return own(seen, query, key, value, attention_mask, **options)
    row_layout.attended.total += 1
    wrong = [name for name in REFUSED if kwargs.get(name) is not None]
    if attention_mask is not None and attention_mask.shape != NO_MASK.shape:
        wrong.append("a mask of its own")
    if wrong:
        raise ValueError(
            f"{type(module).__name__} attends with {', '.join(wrong)}, which is not computed for packed samples nor "
            "for sequence parallelism; drop --packing_samples and --sp_size"
        )
    sliding_window = sliding_window or _window_of(module)
    if isinstance(row_layout, SharedPrompts):
        return _over_prompts(query, key, value, row_layout, scaling=scaling, window=sliding_window), None
    ranks = row_layout.ranks
    if ranks is not None:
        key, value = (_with_heads_for(part, query.shape[1], ranks.size) for part in (key, value))
        query, key, value = _Exchange.apply(ranks, 1, 2, query, key, value)
    segments = row_layout.segments
    causal = bool(getattr(module, "is_causal", True))
    options = {"dropout": dropout, "scaling": scaling, "window": sliding_window, "causal": causal}
    out = attend_in_segments(query, key, value, segments, kernel=kernel, **options)
    if ranks is not None:
        (out,) = _Exchange.apply(ranks, 2, 1, out)
    return out.transpose(1, 2).contiguous(), None


class _Standin:
    """An object in all but the attributes given."""

    def __init__(self, behind: Any, **given: Any) -> None:
        self.__dict__.update(given, _behind=behind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)


def _window_of(module: nn.Module) -> int | None:
    """The window of a layer whose code applies it only in the mask (Qwen2-MoE), which is not read here."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if not types or layer is None or types[layer] != "sliding_attention":
        return None
    window = getattr(module, "sliding_window", None)
    return getattr(config, "sliding_window", None) if window is None else window


def _over_prompts(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrompts, *, scaling: float | None, window: int | None
) -> Tensor:
    """``[1, L, heads, width]``: causal attention where samples see their prompt and themselves."""
    groups = query.shape[1] // key.shape[1]
    flat = [each[0].transpose(0, 1) for each in (query, key, value)]  # [L, heads, width]
    contexts = [layout.all_prompts.fill(each[: sum(layout.prompts)]) for each in flat[1:]]
    sizes = [part.padding.tokens for part in layout.parts]
    outputs = []
    for part, mine in zip(layout.parts, zip(*(each.split(sizes) for each in flat), strict=True), strict=True):
        q, k, v = (part.padding.fill(each) for each in mine)  # [segments, tokens, heads, width]
        if not part.context:
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            out = sdpa(q, k, v, dropout=0.0, scaling=scaling, window=window, causal=True)
        else:
            sources, before = layout.sources[part.segments], slice(0, max(part.context))
            k, v = (
                torch.cat([context[:, before].index_select(0, sources), own], dim=1).transpose(1, 2)
                for context, own in zip(contexts, (k, v), strict=True)
            )
            # The heads of a group become successive queries of their one head of keys.
            q = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            mask = layout.mask(part, window, groups, q.dtype)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            out = out.unflatten(2, (groups, -1)).flatten(1, 2)
        outputs.append(part.padding.drain(out.transpose(1, 2)))
    return torch.cat(outputs).unsqueeze(0)


# ---- ranks that share a sequence -------------------------------------------------------------------------------------
def _with_heads_for(part: Tensor, queries: int, ranks: int) -> Tensor:
    """Keys or values with each head repeated only as often as needed to split them over the ranks."""
    heads = part.shape[1]
    groups = queries // heads
    times = next(n for n in range(1, groups + 1) if groups % n == 0 and heads * n % ranks == 0)
    return part if times == 1 else part.repeat_interleave(times, dim=1)


class _Exchange(torch.autograd.Function):
    """All-to-all: each rank splits one axis over the ranks, and collects all parts of another.

    ``[R, heads, L, width]`` of this rank's tokens thus become ``[R, heads / size, L * size, width]`` of its heads. All
    tensors are sent together, so that ranks wait for each other only once.
    """

    @staticmethod
    def forward(ctx: Any, ranks: SequenceRanks, cut: int, collected: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.cut, ctx.collected = ranks, cut, collected
        return _exchange(tensors, ranks, cut, collected)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_exchange(gradients, ctx.ranks, ctx.collected, ctx.cut)


def _exchange(tensors: tuple[Tensor, ...], ranks: SequenceRanks, cut: int, collected: int) -> tuple[Tensor, ...]:
    pieces = [tensor.chunk(ranks.size, dim=cut) for tensor in tensors]
    outgoing = torch.cat([of_tensor[rank].flatten() for rank in range(ranks.size) for of_tensor in pieces])
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=ranks.group)
    taken = incoming.view(ranks.size, -1).split([of_tensor[0].numel() for of_tensor in pieces], dim=1)
    # Each in its own memory: keeping one for the backward pass does not keep the others.
    return tuple(
        torch.cat([piece.view(of_tensor[0].shape) for piece in parts], dim=collected)
        for parts, of_tensor in zip(taken, pieces, strict=True)
    )
