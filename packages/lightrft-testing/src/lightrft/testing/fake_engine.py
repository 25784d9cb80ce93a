"""An engine without a model: it honours the whole contract, answers at once, and fails on request."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from lightrft.strategy.engine import (
    EngineCapabilities,
    EngineSpec,
    GenerationOutput,
    GenerationRequest,
    Placement,
    RequestId,
    RolloutEngine,
)
from lightrft.strategy.engine_checks import check_room
from lightrft.strategy.errors import RolloutError, WeightSyncError
from lightrft.strategy.lifecycle import Resource
from lightrft.strategy.sampling import sample_seed
from lightrft.strategy.weights import TensorSpec, UpdateKind, UpdatePlan, WeightBucket, take_samples

_VOCABULARY, _EOS, _CONTEXT = 64, 2, 512
_CACHE_BYTES = 4096


@dataclass(kw_only=True)
class Faults:
    """Faults to inject. Each field is one fault; several may be set, and all may be changed while the engine runs.

    Faults in transfer (the engine's own checks find them):

    :param lose_bucket: index of a bucket that never arrives.
    :param double_bucket: index of a bucket that arrives twice.
    :param truncate: name of a tensor that arrives one element short.
    :param misname: name of a tensor that arrives under another one.

    Faults inside the engine (found only by reading the weights back):

    :param stale: acknowledge everything, copy nothing.
    :param alter: name of a tensor whose last element is changed.

    Faults in generation:

    :param hang: never finish; only the deadline ends it. :param fewer_outputs: number of outputs to drop.
    :param die: raise, and stay failed.
    """

    lose_bucket: int | None = None
    double_bucket: int | None = None
    truncate: str | None = None
    misname: str | None = None
    stale: bool = False
    alter: str | None = None
    hang: bool = False
    fewer_outputs: int = 0
    die: bool = False


class FakeEngine(RolloutEngine):
    """Tokens are a hash of (prompt, seed, weight version); weights are kept so that they can be read back.

    Started from a folder, it expects that folder's tensors; otherwise the first update defines its tensors.
    ``EngineSpec.extra`` may set ``faults`` (a :class:`Faults` or a mapping), ``vocab_size`` and ``eos_token_id``.

    :param faults: see :class:`Faults`; the attribute of that name may be changed later.
    """

    name: ClassVar[str] = "fake"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        devices=("cpu", "cuda", "xpu", "mps", "npu"), needs_model=False
    )
    placement: ClassVar[Placement] = "spmd"

    def __init__(self, faults: Faults | None = None) -> None:
        super().__init__()
        self.faults = faults or Faults()
        self.weights: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._cache_bytes = 0
        self._vocabulary, self._eos, self._context = _VOCABULARY, _EOS, _CONTEXT

    # ---- life -------------------------------------------------------------------------------------------------------
    def _start(self, spec: EngineSpec, group: Any) -> None:
        extra = dict(spec.extra)
        faults = extra.pop("faults", None)
        if faults is not None:
            self.faults = faults if isinstance(faults, Faults) else Faults(**faults)
        self._vocabulary = int(extra.pop("vocab_size", _VOCABULARY))
        self._eos = int(extra.pop("eos_token_id", _EOS))
        if extra:
            raise ValueError(
                f'engine "fake" has no options {", ".join(sorted(extra))}; it has faults, vocab_size, eos_token_id'
            )
        self._context = spec.max_model_len or _CONTEXT
        self._cache_bytes = _CACHE_BYTES
        if spec.pretrain is not None:
            self.weights = {name: tensor.to(spec.dtype) for name, tensor in _read_folder(Path(spec.pretrain))}
            self._shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()} or None

    def _shutdown(self) -> None:
        self.weights, self._shapes, self._cache_bytes = {}, None, 0

    # ---- generation -------------------------------------------------------------------------------------------------
    def _submit(self, requests: Mapping[RequestId, GenerationRequest]) -> None:
        for request in requests.values():
            ids = self._read(request)
            if not ids:
                raise ValueError("a prompt is empty: it must have at least one token")
            check_room(len(ids), self._context)
        super()._submit(requests)

    def _poll(self, until: Literal["all", "any"], timeout: float | None) -> list[GenerationOutput]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.faults.hang and self._waiting:
            if deadline is not None and time.monotonic() > deadline:
                waiting = len(self._waiting)
                self._waiting.clear()
                raise TimeoutError(
                    f'engine "fake" hangs as it was told to: {waiting} samples not written in {timeout:g} s'
                )
            time.sleep(0.005)
        return super()._poll(until, timeout)

    def _generate(self, requests: Mapping[RequestId, GenerationRequest]) -> list[GenerationOutput]:
        if self.faults.die:
            self.lifecycle.failed()
            raise RolloutError('engine "fake" died as it was told to')
        outputs = [self._write(i, name, request) for i, (name, request) in enumerate(requests.items())]
        return outputs[: max(0, len(outputs) - self.faults.fewer_outputs)]

    def _read(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        return [byte % self._vocabulary for byte in (request.prompt or "").encode()]

    def _write(self, number: int, request_id: RequestId, request: GenerationRequest) -> GenerationOutput:
        p, prompt, version = request.sampling, self._read(request), self.lifecycle.state.version
        stops = {*p.stop_token_ids, *(() if p.ignore_eos else (self._eos,))}
        seed = sample_seed(self.spec.seed, 0, 0, number) if p.seed is None else p.seed
        stream = _token_stream(f"{prompt}:{0 if p.greedy else seed}:{version}", self._vocabulary)
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: Literal["stop", "length"] = "length"
        for _ in range(min(p.max_tokens, self._context - len(prompt))):
            barred = stops if len(tokens) < p.min_tokens else ()
            token = next(t for t in stream if t not in barred)
            tokens.append(token)
            logprobs.append(-math.log(self._vocabulary - len([t for t in barred if t < self._vocabulary])))
            if token in stops:
                reason = "stop"
                break
        return GenerationOutput(
            request_id=request_id,
            prompt_token_ids=prompt,
            output_token_ids=tokens,
            logprobs=logprobs if p.logprobs else None,
            finish_reason=reason,
            weight_version=version,
        )

    # ---- weights ----------------------------------------------------------------------------------------------------
    def load_bucket(self, bucket: WeightBucket) -> None:
        """Load one bucket, with the faults set for the transfer."""
        if bucket.index == self.faults.lose_bucket:
            return
        tensors = dict(bucket.tensors)
        if self.faults.truncate in tensors:
            tensors[self.faults.truncate] = tensors[self.faults.truncate][..., :-1]
        if self.faults.misname in tensors:
            tensors[f"{self.faults.misname}.renamed"] = tensors.pop(self.faults.misname)
        for _ in range(2 if bucket.index == self.faults.double_bucket else 1):
            super().load_bucket(WeightBucket(bucket.index, tensors))

    def _plan_update(
        self, version: int, specs: tuple[TensorSpec, ...], kind: UpdateKind, bucket_bytes: int
    ) -> UpdatePlan:
        announced = {spec.name: spec.shape for spec in specs}
        expected = self._shapes or announced
        problems = [
            *(f"{name} is announced twice" for name, count in Counter(s.name for s in specs).items() if count > 1),
            *(f"{name} is missing" for name in expected if name not in announced),
            *(f"{name} is unknown" for name in announced if name not in expected),
            *(
                f"{name} is {announced[name]}, expected {shape}"
                for name, shape in expected.items()
                if announced.get(name, shape) != shape
            ),
        ]
        if problems:
            raise WeightSyncError("the weights do not fit: " + "; ".join(problems[:8]))
        self._shapes = dict(expected)
        dtype = self.spec.dtype
        return UpdatePlan(
            version=version,
            kind=kind,
            specs=tuple(s.cast(dtype) for s in specs),
            dtype=dtype,
            bucket_bytes=bucket_bytes,
        )

    def _load_bucket(self, bucket: WeightBucket) -> None:
        for name, tensor in bucket.tensors.items():
            if self.faults.stale:
                self.weights.setdefault(name, torch.zeros_like(tensor))
                continue
            self.weights[name] = tensor.detach().clone()
            if name == self.faults.alter:
                self.weights[name].view(-1)[-1] += 1

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: take_samples(self.weights[name], at) for name, at in positions.items()}

    # ---- memory -----------------------------------------------------------------------------------------------------
    def _release(self, what: Resource, keep: bool) -> int:
        if what == "kv_cache":
            freed, self._cache_bytes = self._cache_bytes, 0
            return freed
        if keep:
            return 0
        freed = sum(tensor.nbytes for tensor in self.weights.values())
        self.weights = {}
        return freed

    def _restore(self, what: Resource, values: bool) -> None:
        if what == "kv_cache":
            self._cache_bytes = _CACHE_BYTES


def _token_stream(key: str, vocabulary: int) -> Iterable[int]:
    """An endless, reproducible stream of token ids."""

    def endless() -> Any:
        block = 0
        while True:
            digest = hashlib.blake2b(f"{key}:{block}".encode()).digest()
            yield from (int.from_bytes(digest[i : i + 4], "little") % vocabulary for i in range(0, 64, 4))
            block += 1

    return endless()


def _read_folder(folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors of a folder's safetensors files, if it has any."""
    for file in sorted(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        yield from load_file(file).items()
