"""A transformers model from a path or a configuration, or one that exists already."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from typing import Any, Literal

import torch
from torch import nn


def attention_implementation(use_flash_attention_2: bool, dtype: torch.dtype) -> str | None:
    """The implementation for transformers; None: its default.

    :param dtype: in which the model computes.
    :raises ValueError: flash attention is not installed, or cannot compute in this dtype.
    """
    if not use_flash_attention_2:
        return None
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "--flash_attn: the package is not installed; pip install flash-attn, or drop the flag (SDPA is used)"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"--flash_attn computes in bf16 or fp16, not in {dtype}; add --bf16, or drop the flag")
    return "flash_attention_2"


def is_vision_language(config: Any) -> bool:
    """Whether a configuration describes a model from images to text."""
    from transformers import AutoModelForImageTextToText

    return type(config) in AutoModelForImageTextToText._model_mapping


def load_model(
    source: Any,
    kind: Literal["generator", "backbone", "sequence-classification"],
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    use_flash_attention_2: bool = False,
    trust_remote_code: bool = False,
    **config_overrides: Any,
) -> nn.Module:
    """A transformers model in train mode.

    :param source: a folder or hub name (weights are loaded), a configuration (random weights; on the meta device
        under ``torch.device("meta")``), or a module, which is returned as it is.
    :param dtype: of the weights. :param compute_dtype: the dtype to which a strategy casts them; None: ``dtype``.
    :param kind: ``generator`` is a causal or an image-text-to-text model, whichever the configuration says.
    :raises ValueError: an empty path, flash attention is not possible, a family without models of this kind, or a model
        of another kind, without the weights that a generator or a classifier needs.
    :raises OSError: from transformers, for a path or name without a model.
    """
    if isinstance(source, nn.Module):
        return source
    import transformers

    attention = attention_implementation(use_flash_attention_2, compute_dtype or dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    from_path = isinstance(source, (str, os.PathLike))
    if from_path and not str(source):
        raise ValueError("--pretrain is empty; give a folder or a hub name")
    config = (
        transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code) if from_path else source
    )
    for key, value in config_overrides.items():
        setattr(config, key, value)
    loader: Any = {
        "backbone": transformers.AutoModel,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "generator": transformers.AutoModelForImageTextToText
        if is_vision_language(config)
        else transformers.AutoModelForCausalLM,
    }[kind]
    own_code = trust_remote_code and loader.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in loader._model_mapping and not own_code:
        instead = {
            "sequence-classification": "a reward model of another family, or a reward server (--remote_rm_url)",
            "backbone": "another model for the critic, or an --advantage_estimator that needs none",
            "generator": "another --pretrain",
        }
        raise ValueError(
            f"{source if from_path else type(config).__name__}: transformers has no {loader.__name__} for models of "
            f"type {config.model_type}; use {instead[kind]}"
        )
    if not from_path:
        model = loader.from_config(config, **options)
    elif torch.get_default_device().type == "meta":
        # Only shapes: the strategy fills each rank's shard from the source that the configuration names.
        model = loader.from_config(config, **options)
        with contextlib.suppress(OSError):  # not all folders have one
            model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    else:
        model, read = loader.from_pretrained(source, config=config, output_loading_info=True, **options)
        random = sorted({name for name, _ in model.named_parameters()} & set(read["missing_keys"]))
        if random and kind != "backbone":
            raise ValueError(
                f"{source}: has no {random[0]}{f' and {len(random) - 1} more' if random[1:] else ''}, which "
                f"{type(model).__name__} would begin with at random; name a folder that holds such a model"
            )
    return model.train()


def hidden_size(config: Any) -> int:
    """Width of the language part's hidden states."""
    return int(config.get_text_config().hidden_size)


def token_types_argument(model: Any) -> str | None:
    """The name under which a model's forward takes token types: 1 at image tokens, 2 at video tokens."""
    names = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in names:
        return "mm_token_type_ids"
    # Other models' token_type_ids are something else: PaliGemma's mark its prefix.
    return "token_type_ids" if model.config.model_type == "gemma3" and "token_type_ids" in names else None


def multimodal_inputs(model: Any, input_ids: torch.Tensor, extras: dict[str, Any]) -> dict[str, Any]:
    """``extras`` without None, and with the token types from which transformers 5 derives positions and masks.

    A processor returns them for prompts, but responses have been appended since.
    """
    given = {key: value for key, value in extras.items() if value is not None}
    name = token_types_argument(model) if given else None
    image_token, video_token = (getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
    if name is not None and name not in given and image_token is not None:
        types = (input_ids == image_token).int()
        if video_token is not None:
            types += 2 * (input_ids == video_token).int()
        given[name] = types
    return given


def images_see_forwards(model: Any) -> bool:
    """Whether the tokens of an image attend to those after them in the same image: Gemma's do."""
    text = model.config.get_text_config(decoder=True)
    return token_types_argument(model) == "token_type_ids" or (
        getattr(text, "use_bidirectional_attention", None) == "vision"
    )


def positions_of(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, extras: dict[str, Any]
) -> torch.Tensor:
    """Position of each token within its row, ``[B, T]``, or ``[3, B, T]`` for models with 2-D positions of images.

    :param extras: the result of :func:`multimodal_inputs`.
    """
    if {"image_grid_thw", "video_grid_thw"} & extras.keys() and hasattr(model.base_model, "get_rope_index"):
        grids = {name: extras[name] for name in ("image_grid_thw", "video_grid_thw") if name in extras}
        types = extras["mm_token_type_ids"]
        return model.base_model.get_rope_index(input_ids, types, **grids, attention_mask=attention_mask)[0]
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
