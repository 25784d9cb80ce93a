"""The critic: the expected return from each token on."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightrft.strategy.hub_files import pretrained_files

from .loading import hidden_size
from .token_model import TokenModel


class ValueHead(nn.Linear):
    """A linear layer from hidden state to value, with the weights of ``source``, else 0.

    Its own initialisation fills it, because a strategy calls that for models on the meta device.

    :param source: a critic's folder or hub name, or another model's, or "".
    """

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, source: str) -> None:
        self.source = source
        super().__init__(hidden_size, 1, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give weight and bias the saved values, or 0.

        :raises ValueError: the saved head is of a model of another width.
        """
        files = {} if self.weight.is_meta else pretrained_files(self.source)
        for name, parameter in (("value_head.weight", self.weight), ("value_head.bias", self.bias)):
            if name not in files:
                parameter.zero_()
                continue
            with safe_open(files[name], framework="pt") as file:
                saved = file.get_tensor(name)
            if saved.shape != parameter.shape:
                raise ValueError(
                    f"{self.source}: {name} is {tuple(saved.shape)}, but this model needs {tuple(parameter.shape)}"
                )
            parameter.copy_(saved)


class Critic(TokenModel):
    """A language model's body with a value head, one scalar per token.

    ``.model`` is the transformers model without its output layer. ``.value_head`` is read from a critic's folder, as
    :meth:`StrategyBase.save_model` writes it; for any other model it starts at 0, so that the first advantages are
    the returns themselves.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a body.
    :param options: see :class:`lightrft.models.token_model.TokenModel`.
    """

    is_critic = True  # strategies recognize a critic by it, for its learning rate

    def __init__(self, pretrain_or_model: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(pretrain_or_model, "backbone", dtype=dtype, **options)
        is_path = isinstance(pretrain_or_model, (str, os.PathLike))
        self.value_head = ValueHead(
            hidden_size(self.model.config), dtype=dtype, source=str(pretrain_or_model) if is_path else ""
        )

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
