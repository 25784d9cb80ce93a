"""From an engine's spec to SGLang's own arguments. Pure: nothing is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError

from ..model_facts import SEQUENCES_ON_CPU, cache_bytes_on_cpu, cache_bytes_per_token, context_length, takes_images
from ..spec_checks import check_dtype, check_extra, require_model

SAMPLING_BACKEND = "lightrft"
WEIGHT_LOADER = "lightrft.engines.sglang.scheduler.load"
# SGLang reserves some positions of a context; we limit the length of a text ourselves.
_RESERVED = 16
# Set by the spec or by this engine: setting them elsewhere would break it.
_OURS = (
    "base_gpu_id",
    "context_length",
    "custom_weight_loader",
    "device",
    "dtype",
    "enable_memory_saver",
    "enable_weights_cpu_backup",
    "load_format",
    "model_path",
    "random_seed",
    "sampling_backend",
    "skip_tokenizer_init",
    "tp_size",
    "trust_remote_code",
)
# A launcher's: with them SGLang's processes would believe to be ranks of the trainer.
_LAUNCHERS = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")


def check_spec(spec: EngineSpec, own: Mapping[str, str]) -> None:
    """:param own: the environment of this process.

    :raises NotBuiltError: SGLang does not support it. :raises ValueError: no model, or an option that may not be set.
    """
    require_model("sglang", spec)
    if spec.pretrain is None and takes_images(spec.model_config):
        raise NotBuiltError(
            'engine "sglang" reads the processor of a vision-language model from its folder, and was given a '
            "configuration alone: set --pretrain, or use --engine_type hf or vllm"
        )
    ranks_here = int(own.get("LOCAL_WORLD_SIZE", spec.tensor_parallel_size))
    if ranks_here % spec.tensor_parallel_size:
        raise NotBuiltError(
            f'engine "sglang" runs all parts of an engine on one node, which has {ranks_here} ranks: --engine_tp_size '
            f"{spec.tensor_parallel_size} must divide them"
        )
    check_dtype("sglang", spec)
    check_extra("sglang", spec, _OURS)


def engine_arguments(spec: EngineSpec, folder: str, config: Any) -> dict[str, Any]:
    """Keyword arguments of SGLang's ``ServerArgs``; unknown ones in ``spec.extra`` are refused later.

    :param folder: folder of the configuration, and with ``spec.pretrain`` of the weights.
    :param config: the transformers configuration of the model.
    """
    context = context_length(config, spec.max_model_len)
    arguments: dict[str, Any] = {
        "model_path": folder,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # a scheduler that polls takes a core from the trainer
        "grammar_backend": "none",
        "log_level": "error",
        "device": spec.device.type,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "random_seed": spec.seed % 2**31,
        "trust_remote_code": spec.trust_remote_code,
        "tp_size": spec.tensor_parallel_size,
        "load_format": "auto" if spec.pretrain is not None else "dummy",
        "mem_fraction_static": spec.memory_utilization,
        "max_running_requests": spec.max_batch_size,
        "context_length": None if context is None else context + _RESERVED,
        "sampling_backend": SAMPLING_BACKEND,
        "custom_weight_loader": [WEIGHT_LOADER],
    }
    if spec.device.type == "cpu":
        sequences = spec.max_batch_size or SEQUENCES_ON_CPU
        room = cache_bytes_on_cpu(spec, config, context, sequences) // cache_bytes_per_token(spec, config)
        arguments |= {
            "attention_backend": "torch_native",
            "max_running_requests": sequences,
            "max_total_tokens": max(room, (context or 0) + _RESERVED),
        }
    else:
        arguments |= {
            "base_gpu_id": spec.device.index or 0,
            "enable_memory_saver": True,
            "enable_weights_cpu_backup": True,
        }
    return {name: value for name, value in arguments.items() if value is not None} | dict(spec.extra)


def environment(spec: EngineSpec, own: Mapping[str, str]) -> dict[str, str]:
    """The environment of SGLang's processes: the trainer's (``own``), without the variables of its rank."""
    kept = {name: value for name, value in own.items() if not name.startswith(_LAUNCHERS)}
    kept["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"  # for the reserved positions
    if spec.device.type == "cpu":
        kept["SGLANG_USE_CPU_ENGINE"] = "1"
        kept["SGLANG_NCCL_SO_PATH"] = os.devnull  # a build for GPUs would look for one if a model is split
        kept.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_by_rank(spec.tensor_parallel_size, _cores()))
    return kept


def cores_by_rank(ranks: int, cores: list[int]) -> str:
    """This process's cores for each rank, in SGLang's form "0,1|2,3"; if there are too few, all ranks share them."""
    each = len(cores) // ranks
    parts = [cores[i * each : (i + 1) * each] if each else cores for i in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
