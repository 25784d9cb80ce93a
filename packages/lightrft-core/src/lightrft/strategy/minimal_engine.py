"""The smallest engine that honours the contract: no model, no dependency, deterministic.

FakeStrategy uses it in unit tests; ``lightrft.testing.FakeEngine`` is this engine with faults on request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from .engine import EngineCapabilities, EngineSpec, GenerationOutput, GenerationRequest, RequestId, RolloutEngine
from .lifecycle import Resource
from .weights import TensorSpec, UpdateKind, UpdatePlan, WeightBucket, take_samples


class MinimalEngine(RolloutEngine):
    """Answers with tokens of the prompt, chosen by a hash of prompt, seed and weight version.

    Weights are kept as sent, so that they can be compared. Answers depend only on their version.
    """

    name: ClassVar[str] = "minimal"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        devices=("cpu", "cuda", "xpu", "mps"), tensor_parallel=True, multimodal=True, needs_model=False
    )

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, torch.Tensor] = {}

    def _start(self, spec: EngineSpec, group: Any) -> None:
        self.weights = {}

    def _generate(self, requests: Mapping[RequestId, GenerationRequest]) -> list[GenerationOutput]:
        return [self._answer(request_id, request) for request_id, request in requests.items()]

    def _answer(self, request_id: RequestId, request: GenerationRequest) -> GenerationOutput:
        prompt = list(request.prompt_token_ids or (request.prompt or " ").encode())
        sampling, version = request.sampling, self.lifecycle.state.version
        seed = 0 if sampling.greedy else sampling.seed
        room = sampling.max_tokens
        if self.spec.max_model_len is not None:
            room = min(room, self.spec.max_model_len - len(prompt))
        tokens: list[int] = []
        reason: Literal["stop", "length"] = "length"
        while len(tokens) < room:
            key = f"{prompt}{seed}{version}{len(tokens)}".encode()
            early = len(tokens) < sampling.min_tokens
            choice = [t for t in prompt if not early or t not in sampling.stop_token_ids] or prompt
            tokens.append(choice[int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") % len(choice)])
            if tokens[-1] in sampling.stop_token_ids and not early:
                reason = "stop"
                break
        return GenerationOutput(
            request_id=request_id,
            prompt_token_ids=prompt,
            output_token_ids=tokens,
            logprobs=[0.0 if sampling.greedy else -1.0] * len(tokens) if sampling.logprobs else None,
            finish_reason=reason,
            weight_version=version,
        )

    def _plan_update(
        self, version: int, specs: tuple[TensorSpec, ...], kind: UpdateKind, bucket_bytes: int
    ) -> UpdatePlan:
        dtype = self.spec.dtype
        cast = tuple(spec.cast(dtype) for spec in specs)
        return UpdatePlan(version=version, kind=kind, specs=cast, dtype=dtype, bucket_bytes=bucket_bytes)

    def _load_bucket(self, bucket: WeightBucket) -> None:
        for name, tensor in bucket.tensors.items():
            self.weights[name] = tensor.detach().to("cpu", copy=True)

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: take_samples(self.weights[name], where) for name, where in positions.items()}

    def _release(self, what: Resource, keep: bool) -> int:
        if what == "kv_cache" or keep:
            return 0  # nothing is on a device
        freed = sum(tensor.nbytes for tensor in self.weights.values())
        self.weights = {}
        return freed

    def _restore(self, what: Resource, values: bool) -> None:
        """Dropped weights are empty until an update brings them; there is nothing to allocate."""

    def _shutdown(self) -> None:
        self.weights = {}
