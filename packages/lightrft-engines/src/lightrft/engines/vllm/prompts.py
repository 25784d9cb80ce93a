"""From requests to vLLM's inputs, and from its outputs to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightrft.strategy.engine import GenerationRequest
from lightrft.strategy.sampling import SamplingParams

from ..model_facts import stop_tokens
from ..processed_prompts import check_images, check_length, check_placeholders


class PromptReader:
    """Turns a request into token ids, with one placeholder for each image.

    The tokenizer is loaded when a text first needs it; token ids do not.

    :param placeholder: the id that stands for an image; None if the model does not support images.
    :param context: most tokens of prompt and response.
    """

    def __init__(
        self,
        model_name: str,
        load_tokenizer: Callable[[], Any],
        *,
        placeholder: int | None,
        context: int | None,
        max_images: int | None,
    ) -> None:
        self._model_name = model_name
        self._load_tokenizer = load_tokenizer
        self._placeholder = placeholder
        self._context = context
        self._max_images = max_images
        self._tokenizer: Any = None

    def read(self, request: GenerationRequest) -> dict[str, Any]:
        """vLLM's prompt.

        :raises ValueError: it leaves no room for a response, or has images that do not match the model or the text.
        """
        if request.prompt_token_ids is not None:
            ids = list(request.prompt_token_ids)
        else:
            self._tokenizer = self._tokenizer or self._load_tokenizer()
            ids = list(self._tokenizer(request.prompt)["input_ids"])
        check_length(len(ids), self._context)
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if request.images:
            check_images(self._model_name, len(request.images), self._placeholder is not None, self._max_images)
            assert self._placeholder is not None
            check_placeholders(ids.count(self._placeholder), f"token {self._placeholder}", len(request.images))
            prompt["multi_modal_data"] = {"image": list(request.images)}
        return prompt


def sampling_arguments(sampling: SamplingParams, ends: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``SamplingParams``.

    :param ends: the model's own end tokens. vLLM must ignore the one that it knows itself, so that all engines agree.
    """
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(0, sampling.top_k),
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "stop_token_ids": stop_tokens(sampling, ends),
        "ignore_eos": True,
        "seed": seed,
        "logprobs": 0 if sampling.logprobs else None,
        "detokenize": False,
    }


def chosen_logprobs(tokens: list[int], rows: list[Mapping[int, Any]]) -> list[float]:
    """The logprob of each token, from vLLM's rows."""
    return [float(row[token].logprob) for token, row in zip(tokens, rows, strict=True)]


def finish_reason(text: str | None) -> Literal["stop", "length", "abort"]:
    """Ours for vLLM's."""
    return "stop" if text == "stop" else "length" if text == "length" else "abort"
