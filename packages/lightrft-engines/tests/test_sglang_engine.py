from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.lifecycle import EngineState, KVCache, Phase, Weights
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing import tiny_model
from lightrft.testing.engine_suite import PROMPTS, EngineSuite, push_weights, requests_for

pytest.importorskip("sglang", reason="SGLang is not installed: uv run nox -s sglang brings it")

from lightrft.engines.sglang import SGLangEngine

AS_LOADED = EngineState(phase=Phase.READY, weights=Weights.RESIDENT, kv_cache=KVCache.RESIDENT)


class LastEngine:
    """The last engine, for as long as its model is asked for: a used one gets its first weights again.

    A start takes half a minute, so not each test that changes weights can have its own.
    """

    def __init__(self) -> None:
        self.make: Any = None
        self._engine: RolloutEngine | None = None
        self._folder = ""

    def fresh(self, folder: str) -> RolloutEngine:
        engine = self._engine
        if engine is None or folder != self._folder or engine.status().phase is Phase.FAILED:
            self.close()
            self._engine, self._folder = self.make(folder), folder
            return self._engine
        engine.abort_update()
        engine.poll("all")
        engine.restore("weights")
        if engine.status() != AS_LOADED:
            push_weights(engine, tiny_model(Path(folder).name), version=1)
            engine.restore("kv_cache")
            engine.lifecycle.state = AS_LOADED
        return engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None


ENGINES = pytest.StashKey[LastEngine]()


class TestSGLangEngine(EngineSuite):
    text_kinds = ("qwen2", "qwen2_tied", "qwen3")
    vision_kinds = ()
    spec_options: ClassVar[Mapping[str, Any]] = {"max_batch_size": 16}
    samples = 1500
    frees_kv_cache = False  # SGLang's sleep needs a GPU; on a CPU its cache is emptied, and stays

    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = SGLangEngine()
            engine.start(spec)
            return engine

        return make

    @pytest.fixture
    def engines(self, request: pytest.FixtureRequest, make_engine: Any) -> Any:
        node = request.node.getparent(pytest.Class)
        assert node is not None
        if (engines := node.stash.get(ENGINES, None)) is None:
            engines = node.stash[ENGINES] = LastEngine()
            node.addfinalizer(engines.close)
        engines.make = lambda folder: make_engine(self.spec(folder))
        return engines

    # SGLang refuses a least length where it has no tokenizer, and it has none: so do we, in words that help.
    def test_stop_tokens_wait_for_min_tokens(self, engine: RolloutEngine) -> None:
        with pytest.raises(ValueError, match="takes no min_tokens"):
            engine.generate(requests_for(PROMPTS[:1], SamplingParams(max_tokens=12, min_tokens=9)))

    test_min_tokens_keep_the_end_token_out_of_the_distribution = None
