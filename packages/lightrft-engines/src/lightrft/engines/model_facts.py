"""What an engine must know about a model before it starts, from its transformers configuration. Pure."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import psutil

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError
from lightrft.strategy.sampling import SamplingParams

SEQUENCES_ON_CPU = 64


def text_config(config: Any) -> Any:
    """The configuration of the language model inside ``config``."""
    return config.get_text_config(decoder=True)


def takes_images(config: Any) -> bool:
    """Whether the model has a vision tower."""
    return getattr(config, "vision_config", None) is not None


def context_length(config: Any, asked: int | None) -> int | None:
    """Most tokens of prompt and response: the requested number, at most the model's positions."""
    own = getattr(text_config(config), "max_position_embeddings", None)
    known = [limit for limit in (asked, own) if isinstance(limit, int) and limit > 0]
    return min(known) if known else None


def cache_bytes_per_token(spec: EngineSpec, config: Any) -> int:
    """Bytes of one token in the KV cache of one rank: keys and values of every layer.

    :raises NotBuiltError: the model has no attention.
    """
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise NotBuiltError(
            f"a {config.model_type} model has no attention, by whose cache an engine's memory is divided here; use "
            "--engine_type hf"
        )
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    per_layer = 2 * max(1, key_heads // spec.tensor_parallel_size) * head_dim * spec.dtype.itemsize
    return text.num_hidden_layers * per_layer


def cache_bytes_on_cpu(spec: EngineSpec, config: Any, context: int | None, sequences: int) -> int:
    """Bytes for the KV cache of one rank: for full sequences, within this rank's share of the free memory."""
    one = cache_bytes_per_token(spec, config) * (math.ceil((context or 2048) / 128) + 1) * 128
    free = int(psutil.virtual_memory().available * spec.memory_utilization / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return max(2 * one, min(sequences * one, free))


def end_tokens(config: Any, generation_config: Any) -> tuple[int, ...]:
    """The model's own end tokens: those of its generation settings, else of its configuration."""
    for source in (generation_config, config, text_config(config)):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
    return ()


def stop_tokens(sampling: SamplingParams, ends: Sequence[int]) -> list[int]:
    """The tokens that end a response, each once. :param ends: the model's own end tokens."""
    return list(dict.fromkeys((*(() if sampling.ignore_eos else ends), *sampling.stop_token_ids)))


def image_placeholder(config: Any) -> int | None:
    """The token id that stands for an image in a prompt."""
    # Gemma 3's prompts have the token that begins an image.
    names = ("boi_token_index",) if config.model_type == "gemma3" else ("image_token_id", "image_token_index")
    for name in names:
        if (token := getattr(config, name, None)) is not None:
            return int(token)
    return None
