"""The policy: a language or vision-language model that returns the logprob of each token of a row."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .fused_logprob import check_plain_head, computing, fused_token_statistics
from .logprobs import token_statistics_from_logits
from .token_model import Question, TokenModel


class Actor(TokenModel):
    """A causal language model, or an image-text-to-text model, as a policy.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a module.
    :param fused_linear_logprob: compute logprobs from hidden states, with the logits of at most ``chunk_size`` tokens
        in memory.
    :param options: see :class:`lightrft.models.token_model.TokenModel`.
    :raises ValueError: ``fused_linear_logprob`` with an output layer that is not a linear one, or a ``chunk_size``
        below 1.
    """

    def __init__(
        self,
        pretrain_or_model: Any,
        *,
        fused_linear_logprob: bool = False,
        chunk_size: int = 4096,
        **options: Any,
    ) -> None:
        if chunk_size < 1:  # before a model is loaded
            raise ValueError(
                f"chunk_size={chunk_size}: must be at least 1, the most tokens whose logits fused_linear_logprob holds "
                "at one time; drop it for 4096"
            )
        super().__init__(pretrain_or_model, "generator", **options)
        if fused_linear_logprob:
            check_plain_head(self.model, self.model.get_output_embeddings())
        self.fused_linear_logprob, self.chunk_size = fused_linear_logprob, chunk_size

    @overload
    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        return_entropy: Literal[False] = False,
        **multimodal: Any,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        return_entropy: Literal[True],
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
        **multimodal: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logprobs of the tokens in the rows, under the distribution at ``temperature``.

        :param sequences: ``[B, T]`` token ids: prompt, response, padding.
        :param attention_mask: ``[B, T]``, 1 at tokens, 0 at padding on the right; None: no padding.
        :param response_mask: ``[B, T]`` bool. Logits are computed only for these tokens, which saves most time and
            memory with long prompts or a large vocabulary. None: for every token but the first of
            a row.
        :param return_entropy: also return the entropy in nats of the distribution that each token was drawn from.
        :param multimodal: ``pixel_values``, ``image_grid_thw`` and other arguments of the model's forward; None is
            skipped.
        :return: ``[B, T]`` fp32, aligned with ``sequences`` and 0 where the mask is false; with ``return_entropy``,
            two of them.
        :raises ValueError: rows with padding on the left, or masks of another shape.
        """
        question = self.ask(sequences, attention_mask, response_mask, multimodal)
        statistics = self._fused if self.fused_linear_logprob else self._from_logits
        logprobs, entropies = statistics(question, temperature, return_entropy)
        if entropies is None:
            return question.spread(logprobs)
        return question.spread(logprobs), question.spread(entropies)

    def _from_logits(self, question: Question, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Logprobs ``[N]``, and entropies, with only the logits of the N tokens in memory."""
        head = self.model.get_output_embeddings()
        if head is None:
            logits = self.model(**question.inputs).logits[question.asked]
        else:
            # A hook, rather than the model's `logits_to_keep`, because that keeps the same columns of all rows; and
            # rather than a product with the layer's weight, because a sharded weight exists only inside the layer.
            hook = head.register_forward_pre_hook(lambda _, args: (args[0][question.asked].unsqueeze(0), *args[1:]))
            with hook:
                logits = self.model(**question.inputs).logits.squeeze(0)  # [0]'s backward would copy them
        return token_statistics_from_logits(logits, question.labels, temperature=temperature, with_entropy=with_entropy)

    def _fused(self, question: Question, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """The same without logits: the output layer returns ``[1, N, 1 or 2]`` statistics instead."""
        head, given = self.model.get_output_embeddings(), []

        def forward(hidden: Tensor) -> Tensor:
            found = fused_token_statistics(
                hidden[question.asked],
                head.weight,
                head.bias,
                question.labels,
                temperature=temperature,
                with_entropy=with_entropy,
                chunk_size=self.chunk_size,
            )
            given.append(torch.stack([part[None] for part in found if part is not None], dim=-1))
            return given[0]

        with computing(head, forward):
            output = self.model(**question.inputs).logits
        if len(given) != 1 or output.shape != given[0].shape or output.data_ptr() != given[0].data_ptr():
            raise ValueError(
                f"--fused_linear_logprob: {type(self.model).__name__} changes its logits after the output layer (a "
                "softcap, a scale); drop the flag"
            )
        return output[0, :, 0], output[0, :, 1] if with_entropy else None


class ActorLanguage(Actor):
    """An actor for text; see :class:`Actor`."""


class ActorVL(Actor):
    """An actor for text and images; see :class:`Actor`.

    :raises ValueError: the model takes no images.
    """

    def __init__(self, pretrain_or_model: Any, **kwargs: Any) -> None:
        super().__init__(pretrain_or_model, **kwargs)
        if not hasattr(self.config, "vision_config"):
            raise ValueError(
                f"--pretrain: {type(self.model).__name__} takes no images; choose a vision-language model, or "
                "`lightrft train`"
            )
