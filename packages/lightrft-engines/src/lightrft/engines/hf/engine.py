"""The embedded Hugging Face engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from lightrft.strategy.batch_engine import BatchEngine
from lightrft.strategy.device import GraphPool, empty_cache, replays_graphs
from lightrft.strategy.engine import (
    EngineCapabilities,
    EngineSpec,
    GenerationOutput,
    GenerationRequest,
    Placement,
    RequestId,
)
from lightrft.strategy.lifecycle import Resource
from lightrft.strategy.weights import TensorSpec
from lightrft.strategy.wide_products import widen_products

from ..spec_checks import require_model
from . import loading

_ROWS_ON_CPU, _ROWS_ON_ACCELERATOR = 128, 256


class HFEngine(BatchEngine):
    """Generates rollouts with a transformers model in the calling process.

    Any causal language model of transformers works, and vision-language ones through their processor. It runs on one
    rank; each rank may have its own.
    """

    name: ClassVar[str] = "hf"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        devices=("cpu", "cuda", "xpu", "mps", "npu"), multimodal=True, requires="transformers>=5.12"
    )
    placement: ClassVar[Placement] = "spmd"

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self._model: Any = None
        self._decoder: Any = None
        self._cache: Any = None
        self._reader: Any = None
        self._weights: Any = None
        self._memory: Any = None
        self._graphs: Any = None
        self._ends: tuple[int, ...] = ()
        self._context: int | None = None

    # ---- life -------------------------------------------------------------------------------------------------------
    def _start(self, spec: EngineSpec, group: Any) -> None:
        loading.require_transformers()
        from ..model_facts import context_length, end_tokens, takes_images
        from ..processed_prompts import PromptReader, from_hub
        from . import attention
        from .cache import SlotCache, attention_windows
        from .decoding import Decoder
        from .step import DecoderModel
        from .step_graphs import StepGraphs
        from .weights import WeightMemory

        require_model(self.name, spec)
        if unknown := sorted(set(spec.extra) - {"enforce_eager"}):
            raise ValueError(
                f'engine "hf" has one extra option, enforce_eager (no CUDA graphs), got {", ".join(unknown)}: remove it'
            )
        model, generation = loading.load_model(spec)
        attention.install(model)
        if spec.dtype != torch.float32:
            widen_products(model)
        plain, window, mixed = attention_windows(model)
        self._model, self._cache = model, SlotCache()
        self._memory = WeightMemory(model)
        self._ends = end_tokens(model.config, generation)
        self._context = context_length(model.config, spec.max_model_len)
        rows = spec.max_batch_size or (_ROWS_ON_CPU if spec.device.type == "cpu" else _ROWS_ON_ACCELERATOR)
        decoded = DecoderModel(
            model=model,
            device=spec.device,
            dtype=spec.dtype,
            cache_argument=loading.cache_argument(model),
            plain=plain,
            window=window,
            mixed=mixed,
        )
        if replays_graphs(spec.device) and not spec.extra.get("enforce_eager"):
            self._graphs = StepGraphs(decoded, self._cache, GraphPool(spec.device).record)
        self._decoder = Decoder(decoded, self._cache, rows, self._graphs)
        self._reader = PromptReader(
            type(model).__name__,
            load_tokenizer=lambda: from_hub(spec, "AutoTokenizer"),
            load_processor=lambda: from_hub(spec, "AutoProcessor"),
            takes_images=takes_images(model.config),
            max_images=spec.max_images,
        )

    def _shutdown(self) -> None:
        device = self.spec.device
        self._clear()
        empty_cache(device)

    # ---- generation -------------------------------------------------------------------------------------------------
    def _read(self, requests: Mapping[RequestId, GenerationRequest]) -> Mapping[RequestId, Any]:
        from ..processed_prompts import read_distinct

        return read_distinct(requests, self._reader, self._context)

    def _write(
        self, requests: Mapping[RequestId, GenerationRequest], inputs: Mapping[RequestId, Any], deadline: float | None
    ) -> list[GenerationOutput]:
        prompts = [inputs[request_id] for request_id in requests]
        samples = [
            self._sample(prompt, request, number)
            for number, (prompt, request) in enumerate(zip(prompts, requests.values(), strict=True))
        ]
        try:
            responses = self._decoder.run(samples, deadline)
        except TimeoutError as error:
            raise TimeoutError(f'engine "hf" was stopped by its deadline: {error}') from None
        outputs = []
        for (request_id, request), prompt, response in zip(requests.items(), prompts, responses, strict=True):
            self._refuse_nan(response.logprobs)
            outputs.append(
                GenerationOutput(
                    request_id=request_id,
                    prompt_token_ids=list(prompt.ids),
                    output_token_ids=response.tokens,
                    logprobs=response.logprobs if request.sampling.logprobs else None,
                    finish_reason=response.finish_reason,
                    weight_version=self.lifecycle.state.version,
                )
            )
        return outputs

    def _sample(self, prompt: Any, request: GenerationRequest, number: int) -> Any:
        from ..model_facts import stop_tokens
        from .decoding import Sample

        sampling = request.sampling
        room = sampling.max_tokens if self._context is None else self._context - len(prompt.ids)
        return Sample(
            prompt=prompt,
            sampling=sampling,
            seed=self._seed(request, number),
            limit=min(sampling.max_tokens, room),
            stops=tuple(stop_tokens(sampling, self._ends)),
        )

    # ---- weights ----------------------------------------------------------------------------------------------------
    def _check_manifest(self, specs: Sequence[TensorSpec]) -> None:
        self._weight_store().check(specs)

    def _load_bucket(self, bucket: Any) -> None:
        self._weight_store().load(bucket.tensors)

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held = self._weight_store().sample(positions)
        # Some families keep a few weights always in float32; their values were sent in the engine's dtype.
        return {name: t.to(self.spec.dtype) if t.is_floating_point() else t for name, t in held.items()}

    def _weight_store(self) -> Any:
        from .weights import WeightStore

        if self._weights is None:
            self._weights = WeightStore(self._model)
        return self._weights

    # ---- memory -----------------------------------------------------------------------------------------------------
    def _release(self, what: Resource, keep: bool) -> int:
        if self._graphs is not None:
            self._graphs.clear()
        if what == "kv_cache":
            freed = self._cache.drop()
        else:
            freed = self._memory.to_host() if keep else self._memory.drop()
        empty_cache(self.spec.device)
        return freed

    def _restore(self, what: Resource, values: bool) -> None:
        if what == "weights":
            self._memory.back()
