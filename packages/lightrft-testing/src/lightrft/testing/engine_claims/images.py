"""Claims about images: answers are those of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightrft.strategy.engine import GenerationRequest, RolloutEngine

from ..tiny_models import tiny_image, tiny_processor
from .claims import SharedEngines
from .hugging_face import HuggingFaceClaims
from .parts import GREEDY, PROMPTS, push_weights, requests_for, shared_model, tokens_of

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


class ImageClaims(HuggingFaceClaims):
    """One image, several, none."""

    def test_images_equal_hugging_face(self, engines: SharedEngines, folders: Any, vision_kind: str) -> None:
        engine, model = self._vision(engines, folders, vision_kind), shared_model(vision_kind)
        prompts = _image_prompts()
        expected = [_image_reference(vision_kind, model, text, images) for text, images in prompts]
        by_text = [GenerationRequest(prompt=text, images=images, sampling=GREEDY) for text, images in prompts]
        tokenizer = tiny_processor(vision_kind).tokenizer
        by_ids = [
            GenerationRequest(prompt_token_ids=tuple(tokenizer(text)["input_ids"]), images=images, sampling=GREEDY)
            for text, images in prompts
        ]
        for requests in (by_text, by_ids, [*by_text, *by_ids]):
            outputs = engine.generate(requests)
            wanted = expected * (len(requests) // len(prompts))
            assert [(o.prompt_token_ids, o.output_token_ids) for o in outputs] == wanted

    def test_a_sync_forgets_what_was_computed_from_images(
        self, engines: SharedEngines, folders: Any, vision_kind: str
    ) -> None:
        engine, new = self._vision(engines, folders, vision_kind), shared_model(vision_kind, 1)
        text, images = _image_prompts()[0]
        request = [GenerationRequest(prompt=text, images=images, sampling=GREEDY)]
        before = tokens_of(engine.generate(request))
        push_weights(engine, new, version=1, bucket_bytes=50_000)
        after = tokens_of(engine.generate(request))
        assert after == [_image_reference(vision_kind, new, text, images)[1]]
        assert after != before

    def test_images_and_placeholders_must_match(self, engines: SharedEngines, folders: Any, vision_kind: str) -> None:
        engine = self._vision(engines, folders, vision_kind)
        request = GenerationRequest(prompt=PLACEHOLDER + "two?", images=(tiny_image(0), tiny_image(1)), sampling=GREEDY)
        with pytest.raises(ValueError, match="placeholder"):
            engine.generate([request])
        assert len(engine.generate(requests_for(PROMPTS[:1], GREEDY))) == 1

    def test_images_for_a_text_model_are_refused(self, engine: RolloutEngine) -> None:
        request = GenerationRequest(prompt_token_ids=PROMPTS[0], images=(object(),), sampling=GREEDY)
        with pytest.raises(ValueError, match="no images"):
            engine.generate([request])

    def _vision(self, engines: SharedEngines, folders: Any, kind: str) -> RolloutEngine:
        pytest.importorskip("torchvision", reason="the processors need it: pip install torchvision pillow")
        return engines.fresh(folders(kind))


def _image_prompts() -> list[tuple[str, tuple[Any, ...]]]:
    """One image, two in one prompt, one image twice, none."""
    wide, small, tall = tiny_image(1, 112, 56), tiny_image(2, 56, 56), tiny_image(3, 56, 84)
    return [
        (f"{PLACEHOLDER}describe the picture", (wide,)),
        (f"first {PLACEHOLDER} and then {PLACEHOLDER} which is larger", (small, wide)),
        (f"{PLACEHOLDER}{PLACEHOLDER}", (tall, tall)),
        ("a prompt without any picture", ()),
    ]


@torch.no_grad()
def _image_reference(kind: str, model: Any, text: str, images: Sequence[Any]) -> tuple[list[int], list[int]]:
    batch = tiny_processor(kind)(text=[text], images=list(images) or None, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    length = batch["input_ids"].shape[1]
    return out[0, :length].tolist(), out[0, length:].tolist()
