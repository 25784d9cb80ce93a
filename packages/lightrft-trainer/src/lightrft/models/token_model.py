"""The common part of actors and critics: a transformers model that is evaluated at the tokens of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightrft.strategy.wide_products import widen_products

from . import row_attention
from .loading import images_see_forwards, is_vision_language, load_model, multimodal_inputs, positions_of
from .lora import ALL_LINEAR, add_adapters
from .row_layout import RowLayout, SequenceRanks
from .rows import check_right_padded, trimmed_length
from .shared_prompts import LARGEST_MASK, WORTHWHILE, SharedPrompts, can_share, has_dropout


@dataclass(frozen=True)
class Question:
    """One forward pass: the model's inputs, and the positions at which results are needed.

    :param inputs: keywords of the model's forward. :param asked: ``[R, L]`` bool over the positions that the model
        sees: true where a result for the *next* token is needed. :param labels: ``[N]``, those next tokens.
    :param layout: how the model's rows were made from the caller's; None: they are the same.
    :param shape: of the caller's rows, ``[B, T]``. :param model: the model.
    """

    inputs: dict[str, Any]
    asked: Tensor
    labels: Tensor
    layout: RowLayout | SharedPrompts | None
    shape: torch.Size
    model: Any

    def answer(self, values: Tensor) -> Tensor:
        """``[R, L]`` values at the model's positions as ``[B, T]`` at the tokens that follow, 0 elsewhere.

        :raises ValueError: the model's forward has not used the layout in every layer.
        """
        # where(), not a product: a value at padding may be anything, even NaN
        kept = torch.where(self.asked, values, torch.zeros_like(values))
        if self.layout is not None:
            row_attention.check_attended(self.model, self.layout)
            kept = self.layout.restore(kept)
        return nn.functional.pad(kept[:, :-1], (1, self.shape[1] - kept.shape[1]))

    def spread(self, values: Tensor) -> Tensor:
        """:meth:`answer` for values ``[N]`` at the asked positions only."""
        empty = torch.zeros(self.asked.shape, dtype=values.dtype, device=values.device)
        return self.answer(empty.masked_scatter(self.asked, values))


class TokenModel(nn.Module):
    """A transformers model, ``.model``, for rows of prompt, response and padding.

    Everything goes through :meth:`forward` and the model's own forward, so that a strategy may shard any part of it. If
    rows have the same prompt, it is computed once, provided that the model allows it (``.shares_prompts``) and enough
    is saved.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a module.
    :param kind: the part of the model to load; see :func:`lightrft.models.loading.load_model`.
    :param dtype: of the weights, if they are loaded or made here.
    :param compute_dtype: the dtype to which a strategy casts the weights; None: ``dtype``.
    :param use_flash_attention_2: refused if the package is not installed.
    :param gradient_checkpointing: recompute activations in the backward pass.
    :param trust_remote_code: run Python code that comes with a hub model.
    :param packing_samples: let the model see the rows of a batch as one, without padding.
    :param sequence_group: process group of the ranks that share each row; all of them must be given the same rows.
        Use ``strategy.sequence_group``; None: each rank has its own rows.
    :param lora_rank: above 0: train LoRA adapters of this rank, and freeze the model; see
        :func:`lightrft.models.lora.add_adapters` for ``lora_alpha``, ``lora_dropout`` and ``target_modules``.
    :raises ValueError: see :func:`lightrft.models.loading.load_model`; or a model in which samples would see each
        other, or whose attention heads cannot be split over the ranks.
    """

    def __init__(
        self,
        pretrain_or_model: Any,
        kind: Literal["generator", "backbone"],
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        use_flash_attention_2: bool = False,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        packing_samples: bool = False,
        sequence_group: Any = None,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        target_modules: str = ALL_LINEAR,
    ) -> None:
        super().__init__()
        self.model: Any = load_model(
            pretrain_or_model,
            kind,
            dtype=dtype,
            compute_dtype=compute_dtype,
            use_flash_attention_2=use_flash_attention_2,
            trust_remote_code=trust_remote_code,
        )
        if lora_rank:
            add_adapters(
                self.model,
                kind,
                rank=lora_rank,
                alpha=lora_alpha,
                dropout=lora_dropout,
                target_modules=target_modules,
            )
        self.packing_samples, self.sequence_ranks = packing_samples, SequenceRanks.of(sequence_group)
        if self.sequence_ranks is not None:
            row_attention.check_heads(self.model, self.sequence_ranks)
            if is_vision_language(self.config):
                raise ValueError(
                    f"--sp_size {self.sequence_ranks.size}: {type(self.model).__name__} takes images, which cannot be "
                    "split over ranks; use 1"
                )
        if packing_samples or self.sequence_ranks is not None:
            row_attention.install(self.model, "--packing_samples" if packing_samples else "--sp_size")
        self.shares_prompts = self.sequence_ranks is None and can_share(self.model)
        self._random = has_dropout(self.model)
        if self.shares_prompts:
            row_attention.install(self.model, "shared prompts")
        widen_products(self.model)
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    def ask(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None,
        response_mask: Tensor | None,
        multimodal: dict[str, Any],
    ) -> Question:
        """The forward pass for rows.

        :param sequences: ``[B, T]`` token ids: prompt, response, padding.
        :param attention_mask: ``[B, T]``, 1 at tokens, 0 at padding on the right; None: no padding.
        :param response_mask: ``[B, T]`` bool, the tokens to evaluate; None: every token but a row's first.
        :param multimodal: ``pixel_values``, ``image_grid_thw`` and other arguments of the model's forward.
        :raises ValueError: rows with padding on the left, masks of another shape, or images that cannot be packed.
        """
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
        for name, given in (("attention_mask", mask), ("response_mask", response_mask)):
            if given is not None and given.shape != sequences.shape:
                raise ValueError(
                    f"{name} {tuple(given.shape)} must have the shape of sequences, {tuple(sequences.shape)}"
                )
        check_right_padded(mask)
        length = trimmed_length(mask)
        tokens, trimmed = sequences[:, :length], mask[:, :length]
        wanted = (trimmed if response_mask is None else response_mask[:, :length]).bool()
        asked, following = nn.functional.pad(wanted[:, 1:], (0, 1)), nn.functional.pad(tokens[:, 1:], (0, 1))
        given = extras = multimodal_inputs(self.model, tokens, multimodal)
        if getattr(self.config.get_text_config(decoder=True), "output_router_logits", False):
            # The router's auxiliary loss is not part of the objective, and parts of rows would not give it.
            extras = {"output_router_logits": False, **extras}
        layout: RowLayout | SharedPrompts | None = None
        if response_mask is not None and self.shares_prompts and not given:
            layout = self._shared(tokens, trimmed, asked)
        if layout is None and not self.packing_samples and self.sequence_ranks is None:
            inputs = {"input_ids": tokens, "attention_mask": trimmed, "use_cache": False, **extras}
            return Question(inputs, asked, following[asked], None, sequences.shape, self.model)
        if given and images_see_forwards(self.model):
            raise ValueError(
                f"--packing_samples: in {type(self.model).__name__} the tokens of an image see those after them, which "
                "is not computed for packed samples; drop the flag"
            )
        layout = layout or RowLayout.of(trimmed, packed=self.packing_samples, ranks=self.sequence_ranks)
        asked = layout.place(asked)
        inputs = {
            "input_ids": layout.place(tokens),
            "attention_mask": row_attention.NO_MASK,
            "position_ids": layout.place(positions_of(self.model, tokens, trimmed, extras)),
            "use_cache": False,
            "row_layout": layout,
            **{name: value for name, value in extras.items() if name != "mm_token_type_ids"},
        }
        return Question(inputs, asked, layout.place(following)[asked], layout, sequences.shape, self.model)

    def _shared(self, tokens: Tensor, mask: Tensor, asked: Tensor) -> RowLayout | SharedPrompts | None:
        """A layout in which shared prompts are computed once; None if that saves too little."""
        if len(tokens) < 2 or (self._random and self.model.training):
            return None
        real, padded = int(mask.sum()), tokens.numel()
        layout = SharedPrompts.of(tokens, asked, at_most=WORTHWHILE * (real if self.packing_samples else padded))
        if layout is None or layout.mask_elements(self._head_groups) <= LARGEST_MASK:
            return layout
        return RowLayout.of(mask, packed=True, ranks=None) if real <= WORTHWHILE * padded else None

    @property
    def _head_groups(self) -> int:
        """Query heads per head of keys."""
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass (non-reentrant, which sharded models need)."""
        options = {"use_reentrant": False, **kwargs.pop("gradient_checkpointing_kwargs", {}), **kwargs}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.model.gradient_checkpointing_disable()
