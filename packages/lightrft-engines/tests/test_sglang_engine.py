from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.testing.engine_suite import EngineSuite

pytest.importorskip("sglang", reason="SGLang is not installed: uv run nox -s sglang brings it")

from lightrft.engines.sglang import SGLangEngine


class TestSGLangEngine(EngineSuite):
    text_kinds = ("qwen2", "qwen2_tied", "qwen3")
    spec_options: ClassVar[Mapping[str, Any]] = {"max_batch_size": 16}
    samples = 1500
    starts_slowly = True  # half a minute

    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = SGLangEngine()
            engine.start(spec)
            return engine

        return make


@pytest.mark.full
class TestSGLangEngineOverTwoRanks(TestSGLangEngine):
    """The same of an engine that splits the model."""

    text_kinds = ("qwen2", "qwen3")
    spec_options: ClassVar[Mapping[str, Any]] = {"max_batch_size": 16, "tensor_parallel_size": 2}
