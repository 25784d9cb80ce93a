"""The critic: what the return from each token on is expected to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .loading import hidden_size, load_model, multimodal_inputs
from .rows import check_right_padded, trimmed_length


class Critic(nn.Module):
    """A language model's body with a value head, one scalar a token.

    ``.model`` is the transformers model without its output layer; ``.value_head`` starts at zero, so that the first
    advantages are the plain returns.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a body.
    """

    is_critic = True  # strategies take the critic's learning rate for it

    def __init__(
        self,
        pretrain_or_model: Any,
        *,
        dtype: torch.dtype = torch.float32,
        use_flash_attention_2: bool = False,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = load_model(
            pretrain_or_model,
            "backbone",
            dtype=dtype,
            use_flash_attention_2=use_flash_attention_2,
            trust_remote_code=trust_remote_code,
        )
        self.value_head = nn.Linear(hidden_size(self.model.config), 1, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        **multimodal: Any,
    ) -> Tensor:
        """``[B, T]`` fp32: at t, the value of the state in which token t was drawn (after t tokens).

        0 in the first column and wherever ``response_mask`` (or, without one, ``attention_mask``) is false. Rows as for
        :meth:`lightrft.models.Actor.forward`.
        """
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
        check_right_padded(mask)
        length = trimmed_length(mask)
        tokens, trimmed = sequences[:, :length], mask[:, :length]
        extras = multimodal_inputs(self.config, tokens, multimodal)
        hidden = self.model(input_ids=tokens, attention_mask=trimmed, use_cache=False, **extras).last_hidden_state
        values = self.value_head(hidden)[..., 0].float()
        wanted = (trimmed if response_mask is None else response_mask[:, :length]).bool()[:, 1:]
        # where(), not a product: a value at padding may be anything, NaN included
        kept = torch.where(wanted, values[:, :-1], torch.zeros_like(values[:, :-1]))
        return nn.functional.pad(kept, (1, sequences.shape[1] - length))

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass (non-reentrant, which sharded models need)."""
        options = {"use_reentrant": False, **kwargs.pop("gradient_checkpointing_kwargs", {}), **kwargs}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.model.gradient_checkpointing_disable()


CriticLanguage = Critic
CriticVL = Critic
