"""From requests to prompts the model takes: token ids, images through the processor, one entry for equal prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightrft.strategy.engine import EngineSpec, GenerationRequest, RequestId
from lightrft.strategy.engine_checks import check_room
from lightrft.strategy.image_inputs import TOKEN_TYPES, process_images


@dataclass(eq=False)  # equal prompts are one object: no need to hash thousands of ids again
class Prompt:
    """One distinct prompt.

    :param ids: token ids as the model sees them, image placeholders expanded.
    :param inputs: further arguments of the model's forward for the prefill (pixel values and the like).
    """

    ids: tuple[int, ...]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


def from_hub(spec: EngineSpec, loader: str) -> Any:
    """Load the model's folder with one of transformers' auto classes.

    :raises ValueError: there is none.
    """
    import transformers

    if spec.pretrain is None:
        raise ValueError(
            "a prompt as text, or with images, needs the model's tokenizer and processor, but this engine was "
            "built from a configuration: send prompt_token_ids, or start it from a folder (pretrain)"
        )
    return getattr(transformers, loader).from_pretrained(spec.pretrain, trust_remote_code=spec.trust_remote_code)


def prompt_key(request: GenerationRequest) -> tuple[Any, ...]:
    """Requests with equal keys have the same prompt (images are compared by identity)."""
    return request.prompt_token_ids, request.prompt, tuple(id(image) for image in request.images)


class PromptReader:
    """Turns a request into a :class:`Prompt`.

    The tokenizer and the processor are loaded when a prompt first needs them; token ids need neither.

    :param load_tokenizer: returns a tokenizer. :param load_processor: returns a multimodal processor, or None.
    :param model_name: for messages.
    """

    def __init__(
        self,
        model_name: str,
        *,
        load_tokenizer: Callable[[], Any],
        load_processor: Callable[[], Any],
        takes_images: bool,
        max_images: int | None = None,
    ) -> None:
        self._model_name = model_name
        self._load_tokenizer = load_tokenizer
        self._load_processor = load_processor
        self._takes_images = takes_images
        self._max_images = max_images
        self._tokenizer: Any = None
        self._processor: Any = None

    def read(self, request: GenerationRequest) -> Prompt:
        """:raises ValueError: images for a text model, more images than allowed, or another count than placeholders."""
        if not request.images:
            if request.prompt_token_ids is not None:
                return Prompt(tuple(request.prompt_token_ids))
            self._tokenizer = self._tokenizer or self._load_tokenizer()
            return Prompt(tuple(self._tokenizer(request.prompt)["input_ids"]))
        check_images(self._model_name, len(request.images), self._takes_images, self._max_images)
        self._processor = self._processor or self._load_processor()
        if request.prompt_token_ids is not None:
            return self._expand(request.prompt_token_ids, request.images)
        assert request.prompt is not None
        self._check_count(request.prompt.count(self._processor.image_token), len(request.images))
        batch = self._processor(text=[request.prompt], images=list(request.images), return_tensors="pt")
        inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
        return Prompt(tuple(batch["input_ids"][0].tolist()), inputs)

    def _expand(self, ids: Sequence[int], images: Sequence[Any]) -> Prompt:
        """Replace each image's placeholder in the ids by what the processor writes for the image."""
        placeholder = self._processor.image_token_id
        self._check_count(sum(token == placeholder for token in ids), len(images))
        written, inputs = process_images(self._processor, images)
        pieces = iter(written)
        parts = [next(pieces) if token == placeholder else {"input_ids": [token]} for token in ids]
        for name in TOKEN_TYPES:
            if name in written[0]:
                inputs[name] = torch.tensor([[kind for part in parts for kind in part.get(name, [0])]])
        return Prompt(tuple(token for part in parts for token in part["input_ids"]), inputs)

    def _check_count(self, placeholders: int, images: int) -> None:
        check_placeholders(placeholders, self._processor.image_token, images)


def read_distinct(
    requests: Mapping[RequestId, GenerationRequest], reader: PromptReader, context: int | None
) -> dict[RequestId, Prompt]:
    """The prompt of each request; equal ones are read once, and are one object.

    :raises ValueError: see :meth:`PromptReader.read` and :func:`check_length`.
    """
    read: dict[Any, Prompt] = {}
    for request in requests.values():
        key = prompt_key(request)
        if key not in read:
            read[key] = reader.read(request)
            check_length(len(read[key].ids), context)
    return {name: read[prompt_key(request)] for name, request in requests.items()}


def check_length(length: int, context: int | None) -> None:
    """:raises ValueError: a prompt is empty, or leaves no room for a response."""
    if not length:
        raise ValueError("a prompt is empty: it must have at least one token")
    check_room(length, context)


def check_images(model_name: str, images: int, takes_images: bool, most: int | None) -> None:
    """:raises ValueError: a prompt has images for a text model, or more than ``most`` (None: any number)."""
    if not takes_images:
        raise ValueError(f"{model_name} takes no images: send only text, or set --pretrain to a vision-language model")
    if most is not None and images > most:
        raise ValueError(
            f"a prompt has {images} images, but at most {most} are allowed: send fewer, or raise max_images"
        )


def check_placeholders(placeholders: int, what: Any, images: int) -> None:
    """:param what: stands for an image. :raises ValueError: there are more of one than of the other."""
    if placeholders != images:
        raise ValueError(
            f"a prompt has {placeholders} image placeholders ({what}) and {images} images: "
            "write one placeholder for each image"
        )
