"""Tiny models, tokenizers and processors, made in memory: no hub, no network, the same weights every time.

Head dimensions are 32, which all engines' attention kernels support. Weights are larger than usual, so that rounding
does not change the likeliest token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
PAD, BOS, EOS = 0, 1, 2
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 3, 4, 5, 6
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CORPUS = (
    "a small boat crosses the quiet lake at dawn",
    "count the stones : one two three four five six seven eight nine ten",
    "user asks , assistant answers ; the sum of 12 and 30 is 42",
    "describe the picture : a red square beside a blue circle",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def _qwen2(**options: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**{**_TEXT, "tie_word_embeddings": False, **options})


def _qwen2_tied(**options: Any) -> Any:
    return _qwen2(**{"tie_word_embeddings": True, **options})


def _llama(**options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**_TEXT, "head_dim": 32, "tie_word_embeddings": False, **options})


def _qwen3(**options: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**{**_TEXT, "head_dim": 32, "tie_word_embeddings": True, **options})


def _qwen3_moe(**options: Any) -> Any:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    return Qwen3MoeConfig(**{**_TEXT, "head_dim": 32, "tie_word_embeddings": False, **experts, **options})


def _mistral(**options: Any) -> Any:
    """All layers have a sliding window."""
    from transformers import MistralConfig

    return MistralConfig(**{**_TEXT, "head_dim": 32, "sliding_window": 8, "tie_word_embeddings": False, **options})


def _qwen2_sliding(**options: Any) -> Any:
    """One layer has full attention, one a sliding window."""
    return _qwen2(**{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **options})


def _vision_text() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    wider = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {**_TEXT, **wider, "max_position_embeddings": 1024, "rope_parameters": rope}


_VISION_IDS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
_PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_vl(**options: Any) -> Any:
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, **_PATCHES}
    return Qwen2VLConfig(text_config=_vision_text(), vision_config=vision, **{**_VISION_IDS, **options})


def _qwen2_5_vl(**options: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
    windows = {"window_size": 112, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(
        text_config=_vision_text(), vision_config={**vision, **windows, **_PATCHES}, **{**_VISION_IDS, **options}
    )


CONFIGS: Mapping[str, Callable[..., Any]] = {
    "qwen2": _qwen2,
    "qwen2_tied": _qwen2_tied,
    "qwen2_sliding": _qwen2_sliding,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}
TEXT_KINDS = ("qwen2", "qwen2_tied", "qwen3", "qwen3_moe", "llama")
VISION_KINDS = ("qwen2_vl", "qwen2_5_vl")


def tiny_config(kind: str, **options: Any) -> Any:
    """The configuration of a tiny model.

    :param kind: one of :data:`CONFIGS`. :param options: override its fields.
    :raises ValueError: the kind is unknown.
    """
    if kind not in CONFIGS:
        raise ValueError(f"no tiny model {kind!r}; there are {', '.join(CONFIGS)}")
    return CONFIGS[kind](**options)


def tiny_model(kind: str = "qwen2", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny transformers model in eval mode. The process's random state is not changed.

    :param seed: of the weights; two seeds are two different models of one shape.
    """
    if options or torch.get_default_device().type != "cpu":  # such as within ``with torch.device("meta")``
        return _made(kind, seed, dtype, **options)
    return copy.deepcopy(_prototype(kind, seed, dtype))


@functools.lru_cache(maxsize=16)
def _prototype(kind: str, seed: int, dtype: torch.dtype) -> Any:
    """To be copied, which takes half the time of making one."""
    return _made(kind, seed, dtype)


def _made(kind: str, seed: int, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForImageTextToText if kind in VISION_KINDS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loader.from_config(tiny_config(kind, **options), dtype=dtype)
        # Biases and norms start as constants, which would hide a missing tensor.
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                elif "visual" in name:
                    parameter.mul_(3.0)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model.eval()


@torch.no_grad()
def set_adapters(model: Any, *, seed: int = 3) -> Any:
    """Give every LoRA adapter in ``model`` an effect (a new one adds 0), the same in any process."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 512 tokens that encodes any text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS * 8, trainer)
    # Every id that a model can generate has its own text.
    core.add_tokens([f"<|unused_{i}|>" for i in range(core.get_vocab_size(), VOCABULARY)])
    names = ("endoftext", "im_start", "im_end", "vision_start_token", "vision_end_token", "image_token", "video_token")
    extra = {name: token for name, token in zip(names, SPECIAL_TOKENS, strict=True) if name.endswith("_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[EOS],
        extra_special_tokens=extra,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_processor(kind: str) -> Any:
    """The processor of a tiny vision-language model: images of 56 to 112 pixels a side become 4 to 16 tokens."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    pixels: Any = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    processor = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[kind]
    return processor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tiny_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=_CHAT_TEMPLATE,
    )


def save_tiny_model(kind: str, folder: Path | str, *, seed: int = 0, **options: Any) -> str:
    """Write a tiny model with its tokenizer (and processor) as a folder that any engine can load; returns its path."""
    folder = Path(folder)
    tiny_model(kind, seed=seed, **options).save_pretrained(folder)
    (tiny_processor(kind) if kind in VISION_KINDS else tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def tiny_image(seed: int, width: int = 70, height: int = 56) -> Any:
    """A picture of smooth coloured noise (needs Pillow)."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")[0]
    return Image.fromarray((pixels * 255).to(torch.uint8).permute(1, 2, 0).numpy())
