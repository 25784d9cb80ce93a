"""Families of vision-language models: engine and training pass see what the model's processor makes of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision", reason="image processors need it: pip install torchvision")

import transformers as hf

from lightrft.models import ActorVL
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.tiny_models import SPECIAL_TOKENS, tiny_image, tiny_tokenizer
from lightrft.trainer.experience import make_batch
from lightrft.trainer.spmd_ppo_trainer_vl import ExperienceMakerVL

SIDE, PATCH = 28, 14
SQUARE = {"height": SIDE, "width": SIDE}
TILES = {"longest_edge": 2 * SIDE}
TEXT: dict[str, Any] = {
    "vocab_size": 560,  # some processors add tokens
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
Family = tuple[Any, Any]


def tokenizer(**names: str) -> Any:
    """The tiny tokenizer, of which unused tokens have the names that a processor looks for."""
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        extra_special_tokens=names,
    )


def unused(number: int) -> str:
    return f"<|unused_{500 + number}|>"


def gemma3() -> Family:
    """An image's tokens see each other both ways, and its placeholder is another token than they."""
    words = tokenizer(boi_token=unused(0), eoi_token=unused(1), image_token=unused(2))
    images: Any = hf.Gemma3ImageProcessor(size=SQUARE)
    processor: Any = hf.Gemma3Processor(image_processor=images, tokenizer=words, image_seq_length=4)
    if processor.image_token != unused(0):
        pytest.skip("this transformers does not tell Gemma 3's placeholder: pip install -U transformers")
    ids = {"boi_token_index": 500, "eoi_token_index": 501, "image_token_index": 502}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    return processor, hf.Gemma3Config(
        text_config={"model_type": "gemma3_text", **TEXT, **layers},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        **ids,
    )


def internvl() -> Family:
    """The processor, and not its image processor, decides that images are cut into tiles."""
    named = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    words = tokenizer(**{name: unused(i) for i, name in enumerate(named)})
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=False, max_patches=3),
        tokenizer=words,
        video_processor=hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=1,
    )
    return processor, hf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            "model_type": "internvl_vision",
            **VISION,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
        },
        image_token_id=processor.image_token_id,
        image_seq_length=1,
    )


def idefics3() -> Family:
    """Images are cut into different numbers of tiles, filled up with empty ones."""
    images: Any = hf.Idefics3ImageProcessor(size=TILES, max_image_size={"longest_edge": SIDE})
    processor = hf.Idefics3Processor(image_processor=images, tokenizer=tokenizer(), image_seq_len=1)
    return processor, hf.Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "idefics3_vision", **VISION},
        image_token_id=processor.image_token_id,
        pad_token_id=0,
    )


def mistral3() -> Family:
    """Images keep their sizes, filled up to the largest of the batch."""
    names = {"image_token": unused(0), "image_break_token": unused(1), "image_end_token": unused(2)}
    processor = hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(size=TILES, patch_size={"height": PATCH, "width": PATCH}),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        spatial_merge_size=2,
        **names,
    )
    return processor, hf.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16, "image_size": 2 * SIDE},
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "gemma3": gemma3,
    "internvl": internvl,
    "idefics3": idefics3,
    "mistral3": mistral3,
}


def save_family(family: str, folder: Path) -> tuple[Any, Any]:
    """The family's processor and model, and a folder with both."""
    processor, config = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():  # an image must matter
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "language_model" not in name and "text_model" not in name:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor, model


def logprobs_of(model: Any, inputs: dict[str, Any], response: list[int]) -> torch.Tensor:
    """Those of the response behind a processor's prompt, by the model's own forward pass."""
    inputs = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            more = torch.tensor([response]) if name == "input_ids" else torch.full((1, len(response)), name[0] == "a")
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], dim=1)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -len(response) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response]


@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(family, marks=pytest.mark.full) for family in ("internvl", "idefics3", "mistral3"))],
)
def test_engine_and_training_pass_compute_what_the_model_does_with_its_processor(family: str, tmp_path: Path) -> None:
    processor, model = save_family(family, tmp_path)
    mark = processor.image_token
    # Wide, high and square; two in one prompt, and none.
    pictures = [tiny_image(0, 100, 56), tiny_image(1, 56, 100), tiny_image(2, 60, 60)]
    asked = [(f"see {mark} and", pictures[:1]), (f"one {mark} two {mark} end", pictures[1:]), ("no picture", [])]
    strategy = FakeStrategy(
        args=StrategyConfig(strategy="fake", engine_type="hf", pretrain=str(tmp_path), enable_engine_sleep=False)
    )
    actor = ActorVL(str(tmp_path)).eval()
    strategy.setup_inference_engine(strategy.args, engine_type="hf", actor=actor)
    maker: Any = ExperienceMakerVL.__new__(ExperienceMakerVL)
    maker.strategy, maker.processor, maker._processed = strategy, processor, (None, {})
    prompts = [
        SimpleNamespace(index=i, prompt_token_ids=processor.tokenizer(text)["input_ids"], images=images, label=None)
        for i, (text, images) in enumerate(asked)
    ]
    outputs = maker.generate(prompts, SamplingParams(max_tokens=5, logprobs=True), step=0)
    batch = make_batch(
        [maker.to_sample(output, prompt) for output, prompt in zip(outputs, prompts, strict=True)],
        0,
        torch.device("cpu"),
    )
    with torch.no_grad():
        trained = actor(batch.tokens, batch.attention_mask, batch.mask, **batch.images)
    for row, (output, (text, images)) in enumerate(zip(outputs, asked, strict=True)):
        inputs = processor(text=[text], images=images, return_tensors="pt") if images else None
        if inputs is None:
            inputs = {"input_ids": torch.tensor([prompts[row].prompt_token_ids])}
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        expected = logprobs_of(model, inputs, output.output_token_ids)
        assert torch.allclose(torch.tensor(output.logprobs), expected, atol=1e-4)
        assert torch.allclose(trained[row][batch.mask[row]], expected, atol=1e-4)


def test_images_that_see_forwards_are_not_packed(tmp_path: Path) -> None:
    processor, _ = save_family("gemma3", tmp_path)
    actor = ActorVL(str(tmp_path), packing_samples=True)
    inputs = processor(text=[f"see {processor.image_token}"], images=[tiny_image(0)], return_tensors="pt")
    with pytest.raises(ValueError, match=r"--packing_samples: in Gemma3.* the tokens of an image see those after them"):
        actor(inputs["input_ids"], pixel_values=inputs["pixel_values"])
