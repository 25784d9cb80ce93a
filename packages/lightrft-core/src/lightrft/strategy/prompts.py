"""Turn the prompts given to a rank into requests. Pure: no rank, no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .engine import GenerationRequest
from .sampling import SamplingParams, sample_seed


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt before sampling: token ids or text, and its images. ``index`` is its global one."""

    prompt_token_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    images: tuple[Any, ...] = ()
    index: int = 0


def make_prompts(
    token_ids: Sequence[Sequence[int]] | None,
    texts: Sequence[str] | None,
    images: Sequence[Any] | None,
    images_num: Sequence[int] | None,
) -> list[Prompt]:
    """One :class:`Prompt` for each entry.

    :param images: None; or a None, an image or a list of images for each prompt; or, with ``images_num``, a flat list.
    :raises ValueError: both or neither of ids and texts; counts that do not add up; an empty prompt.
    """
    if (token_ids is None) == (texts is None):
        which = "neither was" if token_ids is None else "both were"
        raise ValueError(f"gather_and_generate: give all_prompt_token_ids or all_prompts; {which} given")
    count = len(token_ids if token_ids is not None else texts or ())
    pictures = _images_per_prompt(images, images_num, count)
    if texts is not None:
        return [Prompt(prompt=text, images=pictures[i]) for i, text in enumerate(texts)]
    assert token_ids is not None
    if flat := [ids for ids in token_ids if isinstance(ids, int)]:
        raise ValueError(
            f"gather_and_generate: all_prompt_token_ids has {flat[0]} in place of a prompt; give a list of prompts, "
            "each a list of ids"
        )
    if empty := [i for i, ids in enumerate(token_ids) if len(ids) == 0]:
        raise ValueError(f"gather_and_generate: prompt {empty[0]} has no tokens")
    return [Prompt(prompt_token_ids=tuple(int(t) for t in ids), images=pictures[i]) for i, ids in enumerate(token_ids)]


def make_requests(
    prompts: Sequence[Prompt], sampling: SamplingParams, run_seed: int, step: int
) -> list[GenerationRequest]:
    """``sampling.n`` requests for each prompt, one after the other, each with the seed of its place in the run."""
    seed = run_seed if sampling.seed is None else sampling.seed
    return [
        GenerationRequest(
            prompt_token_ids=prompt.prompt_token_ids,
            prompt=prompt.prompt,
            images=prompt.images,
            sampling=replace(sampling, n=1, seed=sample_seed(seed, step, prompt.index, sample)),
        )
        for prompt in prompts
        for sample in range(sampling.n)
    ]


def from_multi_modal_inputs(inputs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Any]]:
    """(texts, images) of vLLM-style inputs: ``{"prompt": ..., "multi_modal_data": {"image": [...]}}``."""
    texts, images = [], []
    for i, item in enumerate(inputs):
        data = dict(item.get("multi_modal_data") or {})
        picture = data.pop("image", None)
        if data or "prompt" not in item:
            raise ValueError(
                f"multimodal input {i}: takes 'prompt' and multi_modal_data['image']; got {sorted([*item, *data])}"
            )
        texts.append(item["prompt"])
        images.append(picture)
    return texts, images


def _images_per_prompt(
    images: Sequence[Any] | None, images_num: Sequence[int] | None, count: int
) -> list[tuple[Any, ...]]:
    if images is None:
        return [()] * count
    if images_num is not None and not any(isinstance(item, (list, tuple)) for item in images):
        if len(images_num) != count or sum(images_num) != len(images):
            raise ValueError(
                f"images_num must have one count per prompt, and their sum must be the number of images: "
                f"{len(images_num)} for {count} prompts, together {sum(images_num)} for {len(images)} images"
            )
        starts = [sum(images_num[:i]) for i in range(count)]
        return [tuple(images[start : start + number]) for start, number in zip(starts, images_num, strict=True)]
    if len(images) != count:
        raise ValueError(
            f"all_images has {len(images)} entries for {count} prompts; give one (or None, or a list) for each prompt"
        )
    each = [() if item is None else tuple(item) if isinstance(item, (list, tuple)) else (item,) for item in images]
    if images_num is not None and [len(item) for item in each] != list(images_num):
        raise ValueError(f"images_num {list(images_num)} differs from the images given, {[len(item) for item in each]}")
    return each
