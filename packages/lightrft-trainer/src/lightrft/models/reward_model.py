"""A trained reward model: one score for a prompt with its response."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .critic import Critic
from .loading import load_model
from .rows import check_right_padded


class RewardModel(nn.Module):
    """A sequence classifier with one output, taken at each row's last token.

    ``.model`` is a transformers sequence classification model. The last token is that of the attention mask:
    transformers looks for padding ids instead, and misses the end token of models that pad with it.

    :param pretrain_or_model: a folder or hub name, a transformers configuration (random weights), or a model.
    """

    def __init__(
        self,
        pretrain_or_model: Any,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        use_flash_attention_2: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = load_model(
            pretrain_or_model,
            "sequence-classification",
            dtype=dtype,
            compute_dtype=compute_dtype,
            use_flash_attention_2=use_flash_attention_2,
            trust_remote_code=trust_remote_code,
            num_labels=1,
        )
        if not isinstance(getattr(self.model, "score", None), nn.Module):
            raise ValueError(
                f"reward model: {type(self.model).__name__} has no `score` layer; use a decoder with a sequence "
                "classification head, such as Qwen2ForSequenceClassification, or a reward server (--remote_rm_url)"
            )
        text = self.model.config.get_text_config()
        if text.pad_token_id is None:  # otherwise transformers refuses batches, though it is not needed here
            text.pad_token_id = 0

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    def forward(self, sequences: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B]`` fp32: the score of each row.

        :param sequences: ``[B, T]`` token ids, padded on the right. :param attention_mask: ``[B, T]``; None: no
            padding.
        :raises ValueError: padding on the left, or a row without a token.
        """
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
        check_right_padded(mask)
        last = mask.long().sum(dim=1) - 1
        if bool((last < 0).any()):
            raise ValueError("reward model: a row has no tokens")
        with _scored_at(self.model.score, last):
            output = self.model(input_ids=sequences, attention_mask=mask, use_cache=False)
        return output.logits[:, 0].float()


@contextmanager
def _scored_at(score: nn.Module, last: Tensor) -> Iterator[None]:
    """Within it, the score layer gets each row's hidden state at ``last`` in all columns.

    So it does not matter which column transformers reads, and the model is still called through its own forward, in
    which a sharded one gathers its weights.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return (chosen[:, None].expand_as(hidden), *args[1:])

    handle = score.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def get_llm_for_sequence_regression(
    pretrain_or_model: Any, model_type: Literal["critic", "reward"], **kwargs: Any
) -> Critic | RewardModel:
    """A critic or a reward model; ``kwargs`` go to its class.

    :raises ValueError: another ``model_type``.
    """
    if model_type == "critic":
        return Critic(pretrain_or_model, **kwargs)
    if model_type == "reward":
        return RewardModel(pretrain_or_model, **kwargs)
    raise ValueError(f"model_type={model_type!r}: there are 'critic' and 'reward'")
