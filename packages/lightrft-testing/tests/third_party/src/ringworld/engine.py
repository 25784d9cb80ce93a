"""An engine that repeats the prompt, seven hooks long."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from lightrft.strategy.engine import (
    EngineCapabilities,
    EngineSpec,
    GenerationOutput,
    GenerationRequest,
    RequestId,
    RolloutEngine,
)
from lightrft.strategy.errors import WeightSyncError
from lightrft.strategy.lifecycle import Resource
from lightrft.strategy.weights import TensorSpec, UpdateKind, UpdatePlan, WeightBucket, take_samples

EOS = 2


class ParrotEngine(RolloutEngine):
    """Says the prompt's tokens again, in an order drawn from the seed and the weights' version."""

    name: ClassVar[str] = "parrot"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(devices=("cpu", "cuda"))

    def _start(self, spec: EngineSpec, group: Any) -> None:
        self.weights = load_file(f"{spec.pretrain}/model.safetensors") if spec.pretrain else {}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        self.cache = 1024

    def _generate(self, requests: Mapping[RequestId, GenerationRequest]) -> list[GenerationOutput]:
        return [self._speak(request_id, request) for request_id, request in requests.items()]

    def _speak(self, request_id: RequestId, request: GenerationRequest) -> GenerationOutput:
        prompt, p, version = list(request.prompt_token_ids or ()), request.sampling, self.lifecycle.state.version
        dice = random.Random(f"{0 if p.greedy else p.seed}:{version}:{prompt}")
        words = sorted({*prompt, 3, 4, 5, 7})
        stops = {*p.stop_token_ids, *(() if p.ignore_eos else (EOS,))}
        room = min(p.max_tokens, (self.spec.max_model_len or 512) - len(prompt))
        said: list[int] = []
        while len(said) < room and not (said and said[-1] in stops):
            choice = [word for word in words if len(said) >= p.min_tokens or word not in stops]
            said.append(dice.choice(choice))
        return GenerationOutput(
            request_id=request_id,
            prompt_token_ids=prompt,
            output_token_ids=said,
            logprobs=[-1.0] * len(said) if p.logprobs else None,
            finish_reason="stop" if said and said[-1] in stops else "length",
            weight_version=version,
        )

    def _plan_update(
        self, version: int, specs: tuple[TensorSpec, ...], kind: UpdateKind, bucket_bytes: int
    ) -> UpdatePlan:
        announced = {spec.name: spec.shape for spec in specs}
        expected = self.shapes or announced
        wrong = [n for n in {**expected, **announced} if expected.get(n) != announced.get(n)]
        if wrong:
            raise WeightSyncError(f"tensors that do not fit: {', '.join(wrong)}")
        self.shapes = dict(expected)
        cast = tuple(spec.cast(self.spec.dtype) for spec in specs)
        return UpdatePlan(version=version, kind=kind, specs=cast, dtype=self.spec.dtype, bucket_bytes=bucket_bytes)

    def _load_bucket(self, bucket: WeightBucket) -> None:
        self.weights.update({name: tensor.detach().clone() for name, tensor in bucket.tensors.items()})

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: take_samples(self.weights[name], at) for name, at in positions.items()}

    def _release(self, what: Resource, keep: bool) -> int:
        if what == "kv_cache":
            freed, self.cache = self.cache, 0
            return freed
        if keep:
            return 0
        freed = sum(tensor.nbytes for tensor in self.weights.values())
        self.weights = {}
        return freed

    def _restore(self, what: Resource, values: bool) -> None:
        if what == "kv_cache":
            self.cache = 1024

    def _shutdown(self) -> None:
        self.weights, self.shapes, self.cache = {}, {}, 0
