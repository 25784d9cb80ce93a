"""The SGLang engine, as the trainer sees it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
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
from lightrft.strategy.errors import RolloutError
from lightrft.strategy.lifecycle import Resource
from lightrft.strategy.weights import TensorSpec

from . import options
from .link import Link
from .prompts import chosen_logprobs, finish_reason, image_input, sampling_arguments
from .weights import RemoteWeights


class SGLangEngine(BatchEngine):
    """Generates rollouts with SGLang, in its own processes: one for each part into which the model is split.

    The first rank of a tensor-parallel group owns them; the others, on the same node, send it their prompts.
    Options of ``EngineSpec.extra`` are those of SGLang's ``ServerArgs``.
    """

    name: ClassVar[str] = "sglang"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        tensor_parallel=True,
        multimodal=True,
        keeps_kv_cache_on=("cpu",),  # SGLang's sleep needs a GPU
        requires="sglang>=0.5.21,<0.6",
    )
    placement: ClassVar[Placement] = "leader"

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self._link: Link | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._reader: Any = None
        self._weights: Any = None
        self._updating = False
        self._dropped = False
        self._ends: tuple[int, ...] = ()
        self._context: int | None = None

    # ---- life -------------------------------------------------------------------------------------------------------
    def _start(self, spec: EngineSpec, group: Any) -> None:
        from ..model_facts import context_length, end_tokens, takes_images
        from ..model_folder import check_loaded, read_configs, save_config
        from ..processed_prompts import PromptReader, from_hub
        from ..recorded_weights import expected_manifest

        options.check_spec(spec, os.environ)
        folder = spec.pretrain
        if folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lightrft-sglang-")
            folder = self._folder.name
            save_config(spec.model_config, folder)
        config, generation = read_configs(folder, trust_remote_code=spec.trust_remote_code)
        self._context, self._ends = context_length(config, spec.max_model_len), end_tokens(config, generation)
        try:
            self._link = Link(spec)
            self._link.call("start", arguments=options.engine_arguments(spec, folder, config))
            self._weights = RemoteWeights(self._link, expected_manifest(config), spec.tensor_parallel_size, spec.dtype)
            self._weights.learn(folder, spec.trust_remote_code)
            if spec.pretrain is not None:
                check_loaded(self.name, self._weights, folder)
        except BaseException:
            self._shutdown()
            raise
        self._reader = PromptReader(
            (getattr(config, "architectures", None) or ["the model"])[0],
            load_tokenizer=lambda: from_hub(spec, "AutoTokenizer"),
            load_processor=lambda: from_hub(spec, "AutoProcessor"),
            takes_images=takes_images(config),
            max_images=spec.max_images,
        )

    def _shutdown(self) -> None:
        if self._link is not None:
            self._link.end()
        if self._folder is not None:
            self._folder.cleanup()
        self._clear()

    def _call(self, method: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        assert self._link is not None
        with self._failing():
            return self._link.call(method, timeout=timeout, **arguments)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """An engine whose processes failed is not used again."""
        try:
            yield
        except RolloutError:
            self.lifecycle.failed()
            raise

    # ---- generation -------------------------------------------------------------------------------------------------
    def _read(self, requests: Mapping[RequestId, GenerationRequest]) -> Mapping[RequestId, Any]:
        from ..processed_prompts import read_distinct

        return read_distinct(requests, self._reader, self._context)

    def _write(
        self, requests: Mapping[RequestId, GenerationRequest], inputs: Mapping[RequestId, Any], deadline: float | None
    ) -> list[GenerationOutput]:
        prompts = [inputs[name] for name in requests]
        sampling = []
        for number, (prompt, request) in enumerate(zip(prompts, requests.values(), strict=True)):
            asked = request.sampling
            limit = (
                asked.max_tokens if self._context is None else min(asked.max_tokens, self._context - len(prompt.ids))
            )
            sampling.append(sampling_arguments(asked, self._ends, self._seed(request, number), limit))
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            answers = self._call(
                "generate",
                timeout=seconds,
                seconds=seconds,
                input_ids=[list(prompt.ids) for prompt in prompts],
                sampling=sampling,
                images=self._images(prompts),
            )
        except TimeoutError as error:
            raise TimeoutError(f'engine "sglang" was stopped by its deadline: {error}') from None
        if len(answers) != len(prompts):
            raise RolloutError(f'engine "sglang" wrote {len(answers)} of {len(prompts)} samples')
        return [
            self._output(name, request, inputs[name], answer)
            for (name, request), answer in zip(requests.items(), answers, strict=True)
        ]

    @staticmethod
    def _images(prompts: Sequence[Any]) -> list[Any]:
        """Inputs of equal prompts are one object, which is sent to SGLang's process once."""
        read = {id(prompt): image_input(prompt.inputs) for prompt in prompts}
        return [read[id(prompt)] for prompt in prompts]

    def _output(self, name: RequestId, request: GenerationRequest, prompt: Any, answer: Any) -> GenerationOutput:
        logprobs = chosen_logprobs(answer)  # always requested: they show broken weights
        self._refuse_nan(logprobs)
        return GenerationOutput(
            request_id=name,
            prompt_token_ids=list(prompt.ids),
            output_token_ids=[int(token) for token in answer["output_ids"]],
            logprobs=logprobs if request.sampling.logprobs else None,
            finish_reason=finish_reason(answer),
            weight_version=self.lifecycle.state.version,
        )

    # ---- weights ----------------------------------------------------------------------------------------------------
    def _check_manifest(self, specs: Sequence[TensorSpec]) -> None:
        self._weights.manifest.check(specs)
        self._close_update()  # one that was aborted
        self._call("begin")
        self._updating = True
        with self._failing():
            self._weights.ask("begin")

    def _load_bucket(self, bucket: Any) -> None:
        with self._failing():
            self._weights.load(bucket.tensors)

    def _finish_update(self) -> None:
        self._close_update()

    def _abort_update(self) -> None:
        self._close_update()

    def _close_update(self) -> None:
        if self._updating:
            self._updating = False
            self._call("end")

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self._failing():
            return self._weights.sample(positions)

    # ---- memory -----------------------------------------------------------------------------------------------------
    def _release(self, what: Resource, keep: bool) -> int:
        if self.spec.device.type != "cpu":
            before = torch.accelerator.get_memory_info(self.spec.device)[0]
            self._call("release", tag=what)
            return max(0, torch.accelerator.get_memory_info(self.spec.device)[0] - before)
        # SGLang has no sleep on a CPU: its cleared cache keeps its memory, and its weights are on the host already.
        if what == "kv_cache":
            self._call("flush")
            return 0
        if keep:
            return 0
        self._dropped = True
        with self._failing():
            return sum(self._weights.ask("empty"))

    def _restore(self, what: Resource, values: bool) -> None:
        if self.spec.device.type != "cpu":
            self._call("resume", tag=what)
        elif what == "weights" and self._dropped:
            self._dropped = False
            with self._failing():
                self._weights.ask("fill")
