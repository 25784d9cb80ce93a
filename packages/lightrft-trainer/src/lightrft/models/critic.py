"""The critic: what the return from each token on is expected to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .loading import hidden_size
from .token_model import TokenModel


class Critic(TokenModel):
    """A language model's body with a value head, one scalar a token.

    ``.model`` is the transformers model without its output layer; ``.value_head`` starts at zero, so that the first
    advantages are the plain returns.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a body.
    :param options: see :class:`lightrft.models.token_model.TokenModel`.
    """

    is_critic = True  # strategies take the critic's learning rate for it

    def __init__(self, pretrain_or_model: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(pretrain_or_model, "backbone", dtype=dtype, **options)
        self.value_head = nn.Linear(hidden_size(self.model.config), 1, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

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
        question = self.ask(sequences, attention_mask, response_mask, multimodal)
        hidden = self.model(**question.inputs).last_hidden_state
        return question.answer(self.value_head(hidden)[..., 0].float())


CriticLanguage = Critic
CriticVL = Critic
