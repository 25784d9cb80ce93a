"""All calls into vLLM: start, groups, caches, end. Imported only when an engine starts."""

from __future__ import annotations

import contextlib
import gc
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import vllm.distributed.parallel_state as parallel_state  # pyright: ignore[reportMissingImports]
from vllm import ModelRegistry, PoolingParams  # pyright: ignore[reportMissingImports]
from vllm import SamplingParams as VLLMSamplingParams  # pyright: ignore[reportMissingImports]
from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

from lightrft.strategy.device import empty_cache
from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError

from .. import recorded_weights
from ..model_folder import read_configs
from ..recorded_weights import WeightMap
from . import memory as memories
from .loading import plain_layers_on_cpu, unchanged_classes
from .options import CLASSIFIER, classifier_arguments, engine_arguments, field_names


class _World:
    """vLLM's groups, one set for all engines of a process.

    :cvar engines: how many are alive. :cvar ours: vLLM made the process group itself, because there was none.
    """

    engines = 0
    ours = False


def start(spec: EngineSpec, folder: str) -> tuple[Any, Any, Any]:
    """A running ``LLMEngine``, the model's transformers configuration, and its generation settings (or None).

    :raises NotBuiltError: vLLM has no class for the model.
    """
    config, generation = read_configs(folder, trust_remote_code=spec.trust_remote_code)
    _know_in_this_process(list(getattr(config, "architectures", None) or []))
    arguments = engine_arguments(spec, folder, config, field_names(EngineArgs), distributed=_in_a_launch())
    return launch(spec, arguments), config, generation


def start_classifier(spec: EngineSpec, *, cuda_graphs: bool) -> tuple[Any, Any]:
    """A running ``LLMEngine`` that scores sequences, and the model's transformers configuration.

    :raises NotBuiltError: the model is not a sequence classifier with one output, or vLLM has no class for it.
    """
    folder = str(spec.pretrain)
    config, _ = read_configs(folder, trust_remote_code=spec.trust_remote_code)
    arguments = classifier_arguments(
        spec, folder, config, field_names(EngineArgs), distributed=_in_a_launch(), cuda_graphs=cuda_graphs
    )
    # vLLM makes the classifier of the language model of that name.
    _know_in_this_process([name.replace(CLASSIFIER, "ForCausalLM") for name in config.architectures or ()])
    return launch(spec, arguments), config


def _in_a_launch() -> bool:
    """Whether a launcher's ranks run this engine. Otherwise vLLM makes, and ends, a process group of one."""
    if _World.engines == 0:
        _World.ours = not dist.is_initialized()
    return not _World.ours


def launch(spec: EngineSpec, arguments: dict[str, Any]) -> Any:
    """Start an engine of vLLM in this process."""
    # vLLM calls old names of torch's, also while it generates, and torch warns of them.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    _World.engines += 1
    try:
        with plain_layers_on_cpu(), unchanged_classes(), _own_shared_memory(spec.device):
            llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
    except BaseException:
        _leave_world()
        raise
    # No teardown at the end of the process: vLLM's would look for a GPU driver, which a CPU does not have, and destroy
    # the trainer's process group.
    llm.engine_core._finalizer.atexit = False
    return llm


@contextlib.contextmanager
def _own_shared_memory(device: torch.device) -> Iterator[None]:
    """Let this start's shared memory have a name of its own, and none once all ranks have mapped it: vLLM names it by
    the ranks alone, and so the next start would stumble over what a killed run left behind."""
    if device.type != "cpu" or not dist.is_initialized():
        yield
        return
    from vllm.distributed.device_communicators import cpu_communicator  # pyright: ignore[reportMissingImports]

    owner: Any = cpu_communicator._CPUSHMDistributed
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    original = owner.make_group_name
    owner.make_group_name = staticmethod(lambda group: name[0] + original(group).replace("/", ""))
    try:
        yield
    finally:
        owner.make_group_name = staticmethod(original)
        for path in Path("/dev/shm").glob(f"{name[0]}*"):
            path.unlink(missing_ok=True)


def _know_in_this_process(names: list[str]) -> None:
    """Inspect the model's class here. vLLM would do it in a new process, which takes half a minute per rank."""
    supported = ModelRegistry.get_supported_archs()
    known = [name for name in names if name in supported]
    if names and not known:
        raise NotBuiltError(
            f'engine "vllm" has no model class for {", ".join(names)}; use --engine_type hf, which serves any causal '
            "language model of transformers"
        )
    for name in known:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def worker(llm: Any) -> Any:
    """The one worker that runs in this process."""
    return llm.engine_core.engine_core.model_executor.driver_worker.worker


def model_runner(llm: Any) -> Any:
    """vLLM's model runner."""
    return worker(llm).model_runner


def model(llm: Any) -> Any:
    """vLLM's module."""
    return model_runner(llm).get_model()


def architecture(llm: Any) -> str:
    """The name of vLLM's model class."""
    return type(model(llm)).__name__


def context(llm: Any) -> int:
    """Most tokens of prompt and response."""
    return llm.model_config.max_model_len


def sampling_params(arguments: dict[str, Any]) -> Any:
    """vLLM's own object."""
    return VLLMSamplingParams(**arguments)


def classify(llm: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    """The classifier's output for each sequence of token ids, no activation applied."""
    for number, tokens in enumerate(sequences):
        prompt = {"prompt_token_ids": list(tokens)}
        llm.add_request(str(number), prompt, PoolingParams(task="classify", use_activation=False))
    scores: dict[str, float] = {}
    while llm.has_unfinished_requests():
        scores |= {answer.request_id: float(answer.outputs.data) for answer in llm.step() if answer.finished}
    return [scores[str(number)] for number in range(len(sequences))]


def check_groups(group: Any, size: int) -> None:
    """:raises NotBuiltError: vLLM splits the model over other ranks than those to which the strategy sends prompts."""
    theirs = list(parallel_state.get_tp_group().ranks)
    if group is not None:
        ours = dist.get_process_group_ranks(group)
    else:
        ours = [dist.get_rank() if dist.is_initialized() else 0]
    if theirs != ours or len(theirs) != size:
        raise NotBuiltError(f'engine "vllm" splits the model over ranks {theirs}, the strategy over ranks {ours}')


def check_whole(weights: WeightMap) -> None:
    """:raises NotBuiltError: some elements of a tensor are on no rank of the tensor-parallel group."""
    held = torch.tensor(list(weights.counts().values()))
    dist.all_reduce(held, group=parallel_state.get_tp_group().cpu_group)
    recorded_weights.check_whole("vllm", weights.manifest.shapes, held.tolist())


def any_rank(answer: bool) -> bool:
    """True if ``answer`` is on any rank of the tensor-parallel group. A collective of that group, on the CPU."""
    flag = torch.tensor([int(answer)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel_state.get_tp_group().cpu_group)
    return bool(flag.item())


def caches(llm: Any) -> list[torch.Tensor]:
    """The tensors of the KV cache."""
    return [tensor for cache in model_runner(llm).kv_caches for tensor in _tensors(cache)]


def _tensors(cache: Any) -> Iterable[torch.Tensor]:
    return [cache] if isinstance(cache, torch.Tensor) else [tensor for part in cache for tensor in _tensors(part)]


def memory(llm: Any, device: torch.device) -> memories.EngineMemory:
    """The memory that can be freed, on this device."""
    if device.type == "cpu":
        return memories.CPUMemory(model(llm), caches(llm))
    return memories.DeviceMemory(worker(llm), device)


def reset_caches(llm: Any, *, zero: bool) -> None:
    """Clear all results of the old weights. :param zero: the KV cache's memory is there and must be cleared too."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.reset_encoder_cache()
    if zero:
        memories.zero_caches(caches(llm))


def end(llm: Any) -> None:
    """End the engine. The trainer's process group stays; vLLM's own teardown would destroy it."""
    core_client = llm.engine_core
    core_client._finalizer.detach()  # it would call dist.destroy_process_group()
    core = core_client.engine_core
    device = worker(llm).device
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    llm.renderer.shutdown()
    _leave_world()
    del core, core_client, llm
    gc.collect()
    empty_cache(torch.device(device))


def _leave_world() -> None:
    """The last engine ends vLLM's groups, and the process group if vLLM made it."""
    _World.engines -= 1
    if _World.engines:
        return
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
    if _World.ours and dist.is_initialized():
        dist.destroy_process_group()
