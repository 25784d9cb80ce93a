"""Forward passes over a batch: logprobs and entropies of the response tokens, values of their states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .experience import ExperienceBatch


@contextlib.contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Within it, the models use no dropout."""
    before = [(model, model.training) for model in models if model is not None]
    for model, _ in before:
        model.eval()
    try:
        yield
    finally:
        for model, training in before:
            model.train(training)


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token values ``[B, T]``, defined only on response tokens.

    :param logprobs: ``logprobs[:, t]`` is token t's, under the distribution at the sampling temperature.
    :param entropies: of the distribution that token t was drawn from, in nats; None if not requested.
    """

    logprobs: Tensor
    entropies: Tensor | None = None


def token_statistics(
    model: nn.Module, batch: ExperienceBatch, temperature: float, *, entropy: bool = False
) -> TokenStatistics:
    """One forward pass of a policy."""
    output = model(
        batch.tokens,
        attention_mask=batch.attention_mask,
        response_mask=batch.mask,
        temperature=temperature,
        return_entropy=entropy,
        **batch.images,
    )
    if entropy:
        logprobs, entropies = output
        return TokenStatistics(logprobs, entropies)
    return TokenStatistics(output)


def token_values(model: nn.Module, batch: ExperienceBatch) -> Tensor:
    """One forward pass of a critic: ``[B, T]``, the value of the state in which each token was drawn."""
    return model(batch.tokens, attention_mask=batch.attention_mask, response_mask=batch.mask, **batch.images)
