"""The common part of engines that answer requests in batches and hold one whole model."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .engine import GenerationOutput, GenerationRequest, RequestId, RolloutEngine
from .errors import RolloutError
from .sampling import sample_seed
from .weights import TensorSpec, UpdateKind, UpdatePlan


class BatchEngine(RolloutEngine):
    """An engine whose ``poll`` answers all waiting requests in one batch.

    Requests are read (text to ids, images to tensors) when they are submitted, so that a wrong one is refused before
    anything is generated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[RequestId, Any] = {}
        self._deadline: float | None = None

    # ---- hooks ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def _read(self, requests: Mapping[RequestId, GenerationRequest]) -> Mapping[RequestId, Any]:
        """The input of each request, in the engine's own form.

        :raises ValueError: a request that cannot be served; none of ``requests`` is queued then.
        """

    @abstractmethod
    def _write(
        self, requests: Mapping[RequestId, GenerationRequest], inputs: Mapping[RequestId, Any], deadline: float | None
    ) -> list[GenerationOutput]:
        """One output for each request, in order.

        :param inputs: what :meth:`_read` made of each. :param deadline: by ``time.monotonic()``; None: no limit.
        :raises TimeoutError: the deadline passed; the whole batch has been stopped.
        """

    @abstractmethod
    def _check_manifest(self, specs: Sequence[TensorSpec]) -> None:
        """:raises WeightSyncError: ``specs`` differ from the model that the engine holds; all differences are named."""

    # ---- generation -------------------------------------------------------------------------------------------------
    def _submit(self, requests: Mapping[RequestId, GenerationRequest]) -> None:
        self._inputs.update(self._read(requests))
        super()._submit(requests)

    def _poll(self, until: Literal["all", "any"], timeout: float | None) -> list[GenerationOutput]:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        return super()._poll(until, timeout)

    def _abort(self, ids: Sequence[RequestId]) -> None:
        super()._abort(ids)
        for request_id in ids:
            self._inputs.pop(request_id, None)

    def _generate(self, requests: Mapping[RequestId, GenerationRequest]) -> list[GenerationOutput]:
        inputs = {name: self._inputs.pop(name) for name in requests}
        return self._write(requests, inputs, self._deadline)

    def shutdown(self) -> None:
        """Give everything back: memory, processes, shared memory. Repeating it does nothing."""
        self._inputs.clear()
        super().shutdown()

    def _seed(self, request: GenerationRequest, number: int) -> int:
        """The request's own seed, else one derived from its ``number`` in the batch."""
        seed = request.sampling.seed
        return sample_seed(self.spec.seed, 0, 0, number) if seed is None else seed

    def _refuse_nan(self, logprobs: Iterable[float]) -> None:
        """:raises RolloutError: the model's logits were NaN."""
        if any(value != value for value in logprobs):
            raise RolloutError(
                f"engine {self.name!r}, weights version {self.lifecycle.state.version}: the model's logits are NaN; "
                "its weights are broken or overflow in this dtype"
            )

    # ---- weights ----------------------------------------------------------------------------------------------------
    def _plan_update(
        self, version: int, specs: tuple[TensorSpec, ...], kind: UpdateKind, bucket_bytes: int
    ) -> UpdatePlan:
        if kind != "full":
            raise ValueError(f'engine {self.name!r} takes whole models only: merge the adapter, or send kind="full"')
        self._check_manifest(specs)
        dtype = self.spec.dtype
        cast = tuple(spec.cast(dtype) for spec in specs)
        return UpdatePlan(version=version, specs=cast, dtype=dtype, bucket_bytes=bucket_bytes)
