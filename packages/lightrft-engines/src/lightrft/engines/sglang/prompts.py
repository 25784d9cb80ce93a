"""From requests to SGLang's inputs, and from its outputs to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lightrft.strategy.sampling import SamplingParams

from ..model_facts import stop_tokens


def sampling_arguments(sampling: SamplingParams, ends: tuple[int, ...], seed: int, limit: int) -> dict[str, Any]:
    """Fields of SGLang's ``SamplingParams``.

    :param ends: the model's own end tokens; SGLang knows only those that are passed here.
    :param limit: most tokens of the response.
    """
    arguments: dict[str, Any] = {
        "max_new_tokens": limit,
        "min_new_tokens": min(sampling.min_tokens, limit),
        "stop_token_ids": stop_tokens(sampling, ends),
        "temperature": sampling.temperature,
        "sampling_seed": seed,
    }
    if sampling.greedy:  # truncation does not change the likeliest token
        return arguments
    arguments |= {"top_p": sampling.top_p, "min_p": sampling.min_p}
    if sampling.top_k > 1:
        arguments["top_k"] = sampling.top_k
    elif sampling.top_k == 1:  # which is how SGLang writes a greedy request
        arguments["min_p"] = 1.0
    return arguments


def image_input(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The processor's output for a prompt's images, for SGLang (``processor_output``); None: no images.

    :param inputs: arguments of the model's forward. They are sent to another process, so tensors become arrays.
    """
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return {"format": "processor_output", **arrays} if arrays else None


def finish_reason(answer: Mapping[str, Any]) -> Literal["stop", "length", "abort"]:
    """Ours for SGLang's."""
    kind = (answer["meta_info"]["finish_reason"] or {}).get("type")
    return "stop" if kind == "stop" else "length" if kind == "length" else "abort"


def chosen_logprobs(answer: Mapping[str, Any]) -> list[float]:
    """The logprob of each token, of SGLang's (logprob, token, text) of each."""
    return [float("nan") if row[0] is None else float(row[0]) for row in answer["meta_info"]["output_token_logprobs"]]
