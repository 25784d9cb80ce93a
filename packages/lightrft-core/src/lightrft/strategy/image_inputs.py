"""What a model's processor makes of images, for the engine that answers a prompt and for the training pass after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Outputs of a processor with one value for each token: what the token shows, 0 for text.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_PER_TOKEN = ("input_ids", "attention_mask", *TOKEN_TYPES)


def process_images(processor: Any, images: Sequence[Any]) -> tuple[list[dict[str, list[int]]], dict[str, torch.Tensor]]:
    """Run a processor on images alone.

    The whole processor, since its image processor does not know all of its settings: by one, InternVL cuts tiles.

    :return: for each image what its placeholder becomes: ``input_ids``, and those of :data:`TOKEN_TYPES` that the model
        takes; and further arguments of the model's forward, for all images.
    """
    made = processor(
        text=[processor.image_token] * len(images),
        images=[[image] for image in images],
        text_kwargs={"add_special_tokens": False, "padding": False, "return_tensors": None},
        images_kwargs={"return_tensors": "pt"},
    )
    per_token = [name for name in _PER_TOKEN if name in made]
    written = [{name: [int(token) for token in made[name][i]] for name in per_token} for i in range(len(images))]
    return written, {name: torch.as_tensor(value) for name, value in made.items() if name not in _PER_TOKEN}
