"""The interface of a rollout engine, and the checks that the base class makes for all engines.

An engine implements the underscored hooks; the public methods check lifecycle, names and counts around them, so
that a missing tensor or a sleeping engine is the same error everywhere.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from .engine_checks import check_room, one_rank_only
from .errors import EngineStateError, NotBuiltError, RolloutError, WeightSyncError
from .lifecycle import EngineState, Lifecycle, Resource, Weights
from .sampling import SamplingParams
from .weights import DEFAULT_BUCKET_BYTES, SyncReceipt, TensorSpec, UpdateKind, UpdatePlan, WeightBucket

if TYPE_CHECKING:
    from .config import StrategyConfig

RequestId = str
Placement = Literal["spmd", "leader", "remote"]


@dataclass(frozen=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do, read by the configuration check before anything loads.

    :param devices: device types that it runs on.
    :param tensor_parallel: sizes above 1 are possible.
    :param sleep_levels: which of level 1 (weights kept on the host) and level 2 (weights dropped) exist.
    :param keeps_kv_cache_on: device types on which a sleeping engine keeps its KV cache's memory.
    :param multimodal: takes images.
    :param logprobs: returns the sampled tokens' logprobs under the distribution they were drawn from.
    :param seeds: honours a seed for each request.
    :param readback: can return elements of its weights (see :meth:`RolloutEngine.sample_weights`).
    :param needs_model: cannot start without a model's folder or configuration.
    :param requires: the distribution that it needs and the range that was tested, for example "vllm>=0.30,<0.33"; if
        one of several suffices, joined by " or ".
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    tensor_parallel: bool = False
    sleep_levels: tuple[int, ...] = (1, 2)
    keeps_kv_cache_on: tuple[str, ...] = ()
    multimodal: bool = False
    logprobs: bool = True
    seeds: bool = True
    readback: bool = True
    needs_model: bool = True
    requires: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """All that an engine needs to start.

    :param pretrain: folder or hub name of the model. None: build from ``model_config`` and wait for the first update.
    :param model_config: a transformers configuration, for an engine that starts without weights.
    :param dtype: the dtype of its weights.
    :param memory_utilization: share of the device's memory for weights and KV cache, 0 to 1.
    :param max_model_len: longest prompt plus response in tokens; None: the model's own limit.
    :param max_batch_size: most sequences decoded at once; None: the engine decides.
    :param max_images: most images in a prompt; None: no limit.
    :param call_timeout: seconds after which a call that hangs inside the engine is abandoned; None: the engine's
        default.
    :param extra: options that only this engine knows.
    """

    pretrain: str | None = None
    model_config: Any = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tensor_parallel_size: int = 1
    memory_utilization: float = 0.5
    max_model_len: int | None = None
    max_batch_size: int | None = None
    max_images: int | None = None
    seed: int = 42
    trust_remote_code: bool = False
    call_timeout: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: StrategyConfig, device: torch.device, **fields: Any) -> EngineSpec:
        """A spec with the settings that concern all engines. :param fields: those of this engine."""
        return cls(
            dtype=getattr(torch, config.dtype_name),
            device=device,
            tensor_parallel_size=config.engine_tp_size,
            memory_utilization=config.engine_mem_util,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
            call_timeout=config.engine_timeout,
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One sample to draw. ``sampling.n`` is 1 and ``sampling.seed`` is this sample's own.

    A text request has ``prompt_token_ids``. A multimodal one has ``prompt`` (text with one placeholder for each
    image) or ``prompt_token_ids`` (one image placeholder id each), and ``images``.
    """

    prompt_token_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    images: tuple[Any, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if self.prompt_token_ids is None and self.prompt is None:
            raise ValueError("a request needs prompt_token_ids or prompt")
        if self.sampling.n != 1:
            raise ValueError(f"sampling.n = {self.sampling.n}: a request to an engine is one sample; send n requests")


@dataclass(kw_only=True)
class GenerationOutput:
    """One response.

    :param prompt_token_ids: as the model saw them (image placeholders expanded).
    :param output_token_ids: sampled tokens, the end token included.
    :param logprobs: natural-log probability of each output token under the distribution it was drawn from; None if
        they were not requested.
    :param finish_reason: "stop" (end or stop token), "length" (max_tokens or the context), or "abort".
    :param weight_version: version of the weights that generated it.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: Literal["stop", "length", "abort"]
    weight_version: int = 0


class RolloutEngine(ABC):
    """Generates rollouts. Subclass it, implement the hooks, register it in the entry-point group ``lightrft.engines``.

    :cvar name: the value of ``--engine_type``.
    :cvar placement: "spmd": every rank of a tensor-parallel group runs it with the same requests; "leader": the group's
        first rank has it; "remote": it is in another process that the leader talks to.
    """

    name: ClassVar[str]
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities()
    placement: ClassVar[Placement] = "spmd"

    def __init__(self) -> None:
        self.lifecycle = Lifecycle()
        self.spec: EngineSpec = EngineSpec()
        self._ids = itertools.count()
        self._finished: dict[RequestId, GenerationOutput] = {}
        self._waiting: dict[RequestId, GenerationRequest] = {}
        self._update: _UpdateLedger | None = None

    # ---- life -------------------------------------------------------------------------------------------------------
    def start(self, spec: EngineSpec, group: Any = None) -> None:
        """Load the model. ``group`` is the tensor-parallel process group (None: this rank alone).

        :raises NotBuiltError: the engine cannot do what the spec asks.
        """
        if spec.tensor_parallel_size > 1 and not self.capabilities.tensor_parallel:
            raise NotBuiltError(one_rank_only(self.name, spec.tensor_parallel_size))
        if spec.device.type not in self.capabilities.devices:
            raise NotBuiltError(
                f"engine {self.name!r} does not run on {spec.device.type}; "
                f"it runs on {', '.join(self.capabilities.devices)}"
            )
        self.spec = spec
        self._start(spec, group)
        self.lifecycle.started(has_weights=spec.pretrain is not None or not self.capabilities.needs_model)

    def status(self) -> EngineState:
        return self.lifecycle.state

    def shutdown(self) -> None:
        """Give everything back: memory, processes, shared memory. Repeating it does nothing."""
        self._finished.clear()
        self._waiting.clear()
        if self.lifecycle.state != EngineState():
            self.lifecycle.stopped()
            self._shutdown()

    # ---- generation -------------------------------------------------------------------------------------------------
    def submit(self, requests: Sequence[GenerationRequest]) -> list[RequestId]:
        """Queue requests; returns their ids in order.

        :raises StaleWeightsError: the weights are incomplete. :raises EngineStateError: asleep or not started.
        :raises ValueError: a prompt leaves no room in the context, or has images for a text engine.
        """
        self.lifecycle.check_generate()
        for request in requests:
            if request.images and not self.capabilities.multimodal:
                raise ValueError(f"engine {self.name!r} takes no images; use one that does, or send only text")
            check_room(len(request.prompt_token_ids or ()), self.spec.max_model_len)
        ids = [f"{self.name}-{next(self._ids)}" for _ in requests]
        self._submit(dict(zip(ids, requests, strict=True)))
        return ids

    def poll(self, until: Literal["all", "any"] = "all", timeout: float | None = None) -> list[GenerationOutput]:
        """Finished outputs, in order of submission. "all" waits for every submitted request, "any" for at least one.

        :raises TimeoutError: ``timeout`` seconds went by first.
        """
        return self._poll(until, timeout)

    def abort(self, ids: Sequence[RequestId]) -> None:
        """Cancel requests; those that have not finished are returned with finish_reason "abort"."""
        self._abort(ids)

    def generate(self, requests: Sequence[GenerationRequest], timeout: float | None = None) -> list[GenerationOutput]:
        """Submit and wait: one output per request, in their order.

        :raises RolloutError: the engine returned fewer, more or other outputs than were asked for.
        """
        ids = self.submit(requests)
        outputs = {output.request_id: output for output in self.poll("all", timeout)}
        mine = set(ids)
        self._finished.update({i: output for i, output in outputs.items() if i not in mine})  # of another caller
        if lost := [i for i in ids if i not in outputs]:
            raise RolloutError(
                f"engine {self.name!r} returned {len(ids) - len(lost)} of {len(ids)} outputs; "
                f"missing are requests {', '.join(str(ids.index(i)) for i in lost[:5])}"
            )
        return [outputs[i] for i in ids]

    # ---- weights ----------------------------------------------------------------------------------------------------
    def begin_update(
        self,
        version: int,
        specs: Sequence[TensorSpec],
        kind: UpdateKind = "full",
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> UpdatePlan:
        """Open an update: the engine checks the manifest against what it expects and says what must travel together.

        :raises EngineStateError: an update is under way, or the weights' memory is released.
        :raises WeightSyncError: names or shapes differ from the engine's model (all differences named), or are listed
            twice.
        """
        counts = Counter(spec.name for spec in specs)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise WeightSyncError(f"announced twice: {', '.join(twice[:5])}")
        self.lifecycle.update_begun()
        try:
            plan = self._plan_update(version, tuple(specs), kind, bucket_bytes)
        except BaseException:
            self.lifecycle.update_aborted()
            raise
        self._update = _UpdateLedger(plan)
        return plan

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Load one bucket. Its memory is reused after the call returns.

        :raises WeightSyncError: a tensor is unknown, sent twice, or has another shape or dtype than announced.
        """
        self._open_update().receive(bucket)
        self._load_bucket(bucket)

    def finish_update(self) -> SyncReceipt:
        """Close the update: all tensors must have been sent. Caches with results of the old weights are reset.

        :raises WeightSyncError: tensors are missing; the weights stay partial.
        """
        ledger = self._open_update()
        ledger.check_complete()
        self._finish_update()
        self._reset_caches()
        self._update = None
        self.lifecycle.update_finished(ledger.plan.version)
        return ledger.receipt()

    def abort_update(self) -> None:
        """Abort an update. The engine refuses to generate until a complete one has succeeded."""
        if self._update is not None:
            self._update = None
            self._abort_update()
        self.lifecycle.update_aborted()

    def _open_update(self) -> _UpdateLedger:
        if self._update is None:
            raise EngineStateError(f"engine {self.name!r}: no weight update is open; call begin_update first")
        return self._update

    def sample_weights(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Elements that the engine holds now, by hub name and flat position (int64), on the CPU.

        :param positions: such as :meth:`local_positions` returns.
        :raises NotBuiltError: this engine cannot read its weights back (``capabilities.readback`` is False).
        """
        raise NotBuiltError(f"engine {self.name!r} cannot read its weights back")

    def local_positions(self, positions: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Those of ``positions`` that this rank's part of the engine holds, in their order; by default all of them.

        An engine that splits a model over ranks overrides it: together the ranks hold everything.
        """
        return positions

    # ---- memory -----------------------------------------------------------------------------------------------------
    def release(self, what: Resource, *, keep: bool = True) -> int:
        """Free memory. Weights are moved to the host (``keep``) or discarded. Returns the bytes freed on the device."""
        return self._release(what, keep) if self.lifecycle.released(what, keep=keep) else 0

    def restore(self, what: Resource) -> None:
        """Allocate the memory again. Discarded weights get only memory: a complete update must fill it."""
        had = self.lifecycle.state.weights
        if self.lifecycle.restored(what):
            self._restore(what, values=what == "kv_cache" or had is Weights.OFFLOADED)

    # ---- hooks ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def _start(self, spec: EngineSpec, group: Any) -> None:
        """Load the model, allocate what generation needs."""

    @abstractmethod
    def _generate(self, requests: Mapping[RequestId, GenerationRequest]) -> list[GenerationOutput]:
        """Generate one output for each request. An asynchronous engine overrides _submit, _poll and _abort instead."""

    @abstractmethod
    def _plan_update(
        self, version: int, specs: tuple[TensorSpec, ...], kind: UpdateKind, bucket_bytes: int
    ) -> UpdatePlan:
        """Check the manifest, choose dtype, order and fused groups."""

    @abstractmethod
    def _load_bucket(self, bucket: WeightBucket) -> None:
        """Copy the tensors in."""

    @abstractmethod
    def _release(self, what: Resource, keep: bool) -> int: ...

    @abstractmethod
    def _restore(self, what: Resource, values: bool) -> None: ...

    @abstractmethod
    def _shutdown(self) -> None: ...

    def _finish_update(self) -> None:
        """Called when all tensors have been loaded."""

    def _abort_update(self) -> None:
        """Called when an update is aborted."""

    def _reset_caches(self) -> None:
        """Clear results of the old weights: prefix, multimodal and encoder caches."""

    def _submit(self, requests: Mapping[RequestId, GenerationRequest]) -> None:
        self._waiting.update(requests)

    def _poll(self, until: Literal["all", "any"], timeout: float | None) -> list[GenerationOutput]:
        waiting, self._waiting = self._waiting, {}
        deadline = None if timeout is None else time.monotonic() + timeout
        outputs = self._generate(waiting) if waiting else []
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(
                f"engine {self.name!r}: generating {len(waiting)} samples took longer than {timeout:g} s"
            )
        return [*_drain(self._finished), *outputs]

    def _abort(self, ids: Sequence[RequestId]) -> None:
        for request_id in ids:
            if (request := self._waiting.pop(request_id, None)) is not None:
                self._finished[request_id] = GenerationOutput(
                    request_id=request_id,
                    prompt_token_ids=list(request.prompt_token_ids or ()),
                    output_token_ids=[],
                    logprobs=[] if request.sampling.logprobs else None,
                    finish_reason="abort",
                    weight_version=self.lifecycle.state.version,
                )


def _drain(outputs: dict[RequestId, GenerationOutput]) -> Iterator[GenerationOutput]:
    while outputs:
        yield outputs.pop(next(iter(outputs)))


class _UpdateLedger:
    """The tensors that an update announced, and those that were sent."""

    def __init__(self, plan: UpdatePlan) -> None:
        self.plan = plan
        self.expected = {spec.name: spec for spec in plan.specs}
        self.received: set[str] = set()
        self.nbytes = 0
        self.buckets = 0
        self.begun = time.monotonic()

    def receive(self, bucket: WeightBucket) -> None:
        for name, tensor in bucket.tensors.items():
            spec = self.expected.get(name)
            if spec is None:
                raise WeightSyncError(f"bucket {bucket.index}: tensor {name} was not announced")
            if name in self.received:
                raise WeightSyncError(f"bucket {bucket.index}: tensor {name} was sent twice")
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise WeightSyncError(
                    f"bucket {bucket.index}: tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"but announced as {spec.shape} {spec.dtype}"
                )
            self.received.add(name)
        self.nbytes += bucket.nbytes
        self.buckets += 1

    def check_complete(self) -> None:
        if missing := [name for name in self.expected if name not in self.received]:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise WeightSyncError(f"{len(missing)} of {len(self.expected)} tensors were not sent: {shown}")

    def receipt(self) -> SyncReceipt:
        return SyncReceipt(
            version=self.plan.version,
            kind=self.plan.kind,
            tensors_expected=len(self.expected),
            tensors_received=len(self.received),
            tensors_changed=len(self.received),
            nbytes=self.nbytes,
            buckets=self.buckets,
            seconds=time.monotonic() - self.begun,
            verified="manifest",
            digest="",
        )
