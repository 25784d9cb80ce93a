"""Reward models in vLLM."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import RolloutError
from lightrft.strategy.scoring import ScoringEngine

from ..spec_checks import check_dtype
from .process_guard import ProcessGuard


class VLLMScoringEngine(ScoringEngine):
    """Scores sequences with vLLM, in the training process, with or without a rollout engine.

    The model is a sequence classifier with one output, whose language model vLLM supports.
    """

    name: ClassVar[str] = "vllm"

    def __init__(self) -> None:
        self._llm: Any = None
        self._memory: Any = None
        self._guard: Any = None
        self._context: int | None = None
        self._asleep = False

    def start(self, spec: EngineSpec, group: Any = None, *, cuda_graphs: bool = False) -> None:
        check_dtype(self.name, spec)
        self._guard = ProcessGuard(spec.device)
        with self._guard, warnings.catch_warnings(action="ignore", category=FutureWarning):
            from . import backend

        with self._guard:
            try:
                self._llm, _ = backend.start_classifier(spec, cuda_graphs=cuda_graphs)
                backend.check_groups(group, spec.tensor_parallel_size)
                self._memory = backend.memory(self._llm, spec.device)
            except BaseException:
                self._end()
                raise
        self._context = backend.context(self._llm)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """See :meth:`ScoringEngine.score`.

        :raises ValueError: a sequence is empty or longer than the engine's context.
        :raises RolloutError: vLLM failed.
        """
        from . import backend

        for number, tokens in enumerate(sequences):
            if not 0 < len(tokens) <= (self._context or len(tokens)):
                raise ValueError(
                    f"reward model: sample {number} has {len(tokens)} tokens, the engine accepts 1 to {self._context}: "
                    "shorten it, or raise --max_model_len"
                )
        try:
            with self._guard:
                return backend.classify(self._llm, sequences)
        except Exception as error:
            raise RolloutError(f'engine "vllm" failed while scoring: {type(error).__name__}: {error}') from error

    def release(self) -> None:
        if self._asleep:
            return
        from . import backend

        with self._guard:
            backend.reset_caches(self._llm, zero=False)
            self._memory.release_cache()
            self._memory.release_weights(keep=True)
        self._asleep = True

    def restore(self) -> None:
        if not self._asleep:
            return
        with self._guard:
            self._memory.restore_weights()
            self._memory.restore_cache()
        self._asleep = False

    def shutdown(self) -> None:
        if self._llm is not None:
            with self._guard:
                self._end()

    def _end(self) -> None:
        from . import backend

        self._memory = None
        if self._llm is not None:
            llm, self._llm = self._llm, None
            backend.end(llm)
