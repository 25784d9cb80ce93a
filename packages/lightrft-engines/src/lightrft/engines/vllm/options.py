"""From an engine's spec to vLLM's own arguments. Pure: nothing is started."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError

from ..model_facts import SEQUENCES_ON_CPU, cache_bytes_on_cpu, context_length, takes_images
from ..spec_checks import check_extra

# Suffix of the names of transformers' sequence classifiers.
CLASSIFIER = "ForSequenceClassification"
TOKENS_A_STEP_ON_CPU = 8192
# Set by the spec or by this engine: setting them elsewhere would break it.
_OURS = (
    "disable_log_stats",
    "distributed_executor_backend",
    "dtype",
    "enable_lora",
    "enable_sleep_mode",
    "load_format",
    "logprobs_mode",
    "model",
    "pipeline_parallel_size",
    "quantization",
    "runner",
    "seed",
    "speculative_config",
    "tensor_parallel_size",
    "trust_remote_code",
)


def engine_arguments(
    spec: EngineSpec, folder: str, config: Any, known: Mapping[str, Any], *, distributed: bool
) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``EngineArgs``.

    :param folder: folder of the configuration, and with ``spec.pretrain`` of the weights.
    :param config: the transformers configuration of the model.
    :param known: the fields that ``EngineArgs`` has, to check ``spec.extra``.
    :param distributed: a launcher's ranks run it, not a single process.
    :raises ValueError: ``spec.extra`` has options that vLLM does not have, or that the spec sets.
    """
    if unknown := sorted(set(spec.extra) - set(known)):
        raise ValueError(f'engine "vllm" has no option {", ".join(unknown)}; it has those of vLLM\'s EngineArgs')
    check_extra("vllm", spec, _OURS)
    on_cpu = spec.device.type == "cpu"
    context = context_length(config, spec.max_model_len)
    sequences = spec.max_batch_size or (SEQUENCES_ON_CPU if on_cpu else None)
    arguments: dict[str, Any] = {
        "model": folder,
        "skip_tokenizer_init": not takes_images(config),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "seed": spec.seed % 2**32,
        "trust_remote_code": spec.trust_remote_code,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "distributed_executor_backend": "external_launcher" if distributed else "uni",
        "load_format": "auto" if spec.pretrain is not None else "dummy",
        "gpu_memory_utilization": spec.memory_utilization,
        "max_model_len": context,
        "max_num_seqs": sequences,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "enforce_eager": on_cpu,
        "enable_sleep_mode": not on_cpu,
        "async_scheduling": False,
    }
    if takes_images(config):
        arguments["limit_mm_per_prompt"] = {"image": 999 if spec.max_images is None else spec.max_images, "video": 0}
        arguments["skip_mm_profiling"] = on_cpu
    if on_cpu:
        # A prompt that is prefilled in parts rewinds its sample's generator, which a CPU's cannot do.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(TOKENS_A_STEP_ON_CPU, context or 0)
        arguments["kv_cache_memory_bytes"] = cache_bytes_on_cpu(spec, config, context, sequences or SEQUENCES_ON_CPU)
    else:
        arguments["moe_backend"] = "triton"  # keeps the experts in the layout in which they are loaded
    if spec.call_timeout is not None:
        arguments["distributed_timeout_seconds"] = max(1, math.ceil(spec.call_timeout))
        arguments["cpu_distributed_timeout_seconds"] = max(1, math.ceil(spec.call_timeout))
    arguments = {name: value for name, value in arguments.items() if value is not None and name in known}
    return arguments | dict(spec.extra)


def classifier_arguments(
    spec: EngineSpec, folder: str, config: Any, known: Mapping[str, Any], *, distributed: bool, cuda_graphs: bool
) -> dict[str, Any]:
    """Keyword arguments for an engine that scores sequences.

    :raises NotBuiltError: the model is not a sequence classifier with one output.
    """
    architectures = list(getattr(config, "architectures", None) or [])
    if not architectures or any(CLASSIFIER not in name for name in architectures) or config.num_labels != 1:
        raise NotBuiltError(
            f'--rm_use_engine: engine "vllm" serves sequence classifiers with one output; {folder} is '
            f"{', '.join(architectures) or config.model_type} with {config.num_labels} outputs: name another "
            "--reward_pretrain, or drop --rm_use_engine"
        )
    arguments = engine_arguments(spec, folder, config, known, distributed=distributed)
    arguments.pop("logprobs_mode", None)
    return {**arguments, "runner": "pooling", "enforce_eager": not cuda_graphs}


def field_names(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name."""
    return {field.name: field for field in dataclasses.fields(cls)}
