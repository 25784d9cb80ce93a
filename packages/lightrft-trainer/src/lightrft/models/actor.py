"""The policy: a language or vision-language model that says how likely each token of a row was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .loading import load_model, multimodal_inputs
from .logprobs import token_statistics_from_logits
from .rows import check_right_padded, trimmed_length


class Actor(nn.Module):
    """A causal language model, or an image-text-to-text model, as a policy.

    ``.model`` is the transformers model. Everything goes through :meth:`forward` and the model's own forward, so that
    a strategy may shard any part of it.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a module.
    :param dtype: of the weights, where they are loaded or made here.
    :param use_flash_attention_2: refused where the package is not installed.
    :param gradient_checkpointing: recompute activations in the backward pass.
    :param trust_remote_code: run code that a hub model brings along.
    :raises ValueError: see :func:`lightrft.models.loading.load_model`.
    """

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
            "generator",
            dtype=dtype,
            use_flash_attention_2=use_flash_attention_2,
            trust_remote_code=trust_remote_code,
        )
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

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
        :param response_mask: ``[B, T]`` bool. Logits are made for these tokens alone, which is most of the saving in
            time and memory where prompts are long or the vocabulary is large. None: for every token but the first of
            a row.
        :param return_entropy: also return the entropy in nats of the distribution that each token was drawn from.
        :param multimodal: ``pixel_values``, ``image_grid_thw`` and whatever else the model's forward takes; None is
            left out.
        :return: ``[B, T]`` fp32, aligned with ``sequences`` and 0 where the mask is false; with ``return_entropy``,
            two of them.
        :raises ValueError: rows with padding on the left, or masks of another shape.
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
        wanted = (trimmed if response_mask is None else response_mask[:, :length]).bool()[:, 1:]
        labels = tokens[:, 1:][wanted]
        logits = self._logits(tokens, trimmed, wanted, multimodal)
        logprobs, entropies = token_statistics_from_logits(
            logits, labels, temperature=temperature, with_entropy=return_entropy
        )
        target = nn.functional.pad(wanted, (1, sequences.shape[1] - length))
        spread = torch.zeros(sequences.shape, dtype=logprobs.dtype, device=logprobs.device)
        if entropies is None:
            return spread.masked_scatter(target, logprobs)
        return spread.masked_scatter(target, logprobs), spread.masked_scatter(target, entropies)

    def _logits(self, tokens: Tensor, attention_mask: Tensor, wanted: Tensor, multimodal: dict[str, Any]) -> Tensor:
        """``[N, V]``: the logits that the N wanted tokens were drawn from, row after row."""
        extras = multimodal_inputs(self.config, tokens, multimodal)
        inputs = {"input_ids": tokens, "attention_mask": attention_mask, "use_cache": False, **extras}
        head = self.model.get_output_embeddings()
        if head is None:
            return self.model(**inputs).logits[:, :-1][wanted]
        with _only_for(head, wanted):
            return self.model(**inputs).logits[0]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass (non-reentrant, which sharded models need)."""
        options = {"use_reentrant": False, **kwargs.pop("gradient_checkpointing_kwargs", {}), **kwargs}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.model.gradient_checkpointing_disable()


@contextmanager
def _only_for(head: nn.Module, wanted: Tensor) -> Iterator[None]:
    """While open, the output layer is given only the hidden states before the wanted tokens, as ``[1, N, H]``.

    A hook, rather than the model's ``logits_to_keep``, because that keeps the same columns of all rows; and rather
    than a product with the layer's weight, because a sharded weight exists only inside the layer's own forward.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[:, :-1][wanted].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


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
