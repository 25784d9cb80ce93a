"""Load a transformers model from a folder or the hub, or build it from a configuration."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError, PluginError


def require_transformers() -> None:
    """:raises PluginError: transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise PluginError('engine "hf" needs transformers, which is not installed: pip install "lightrft-engines[hf]"')


def load_model(spec: EngineSpec) -> tuple[Any, Any]:
    """Model (in eval mode, no gradients) and its generation settings.

    A model made from ``spec.model_config`` has uninitialised weights; buffers that are not in checkpoints (rotary
    frequencies) are correct.
    """
    from transformers import AutoConfig, GenerationConfig

    with _rng_untouched():
        if spec.pretrain is not None:
            config = AutoConfig.from_pretrained(spec.pretrain, trust_remote_code=spec.trust_remote_code)
            model = _model_class(config).from_pretrained(
                spec.pretrain, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code
            )
            model = model.to(spec.device)
        else:
            from transformers.initialization import no_init_weights

            config = copy.deepcopy(spec.model_config)  # the trainer's model may have the same object
            with no_init_weights(), torch.device(spec.device):
                model = _model_class(config).from_config(
                    config, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code
                )
            model.tie_weights()
    model.eval().requires_grad_(False)
    own_storages(model)
    return model, model.generation_config or GenerationConfig.from_model_config(model.config)


def _model_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def cache_argument(model: Any) -> str:
    """The name under which the model's forward takes its cache.

    :raises NotBuiltError: it takes none, or keeps a state beside it: unseen, such a model would answer with other
        probabilities than it has.
    """
    names = inspect.signature(model.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in names), None)
    in_modules = any(hasattr(module, "_setup_cache") for module in model.modules())  # RecurrentGemma's
    if name is not None and not in_modules and model._supports_default_dynamic_cache():
        return name
    raise NotBuiltError(
        f'engine "hf": {type(model).__name__} keeps what it has read in a form of its own, and not in a cache of '
        "transformers; use --engine_type vllm or sglang, if they serve it, or another model"
    )


def own_storages(model: torch.nn.Module) -> None:
    """Give every parameter its own resizable storage: a checkpoint's memory map is shared and cannot be freed."""
    fresh: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        if storage.resizable() and storage.nbytes() == parameter.nbytes and parameter.is_contiguous():
            continue
        key = parameter.data_ptr()
        if key not in fresh:
            fresh[key] = parameter.detach().clone(memory_format=torch.contiguous_format)
        parameter.data = fresh[key]


@contextmanager
def _rng_untouched() -> Iterator[None]:
    """Restore torch's CPU generator at the end: constructing modules draws from it."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
