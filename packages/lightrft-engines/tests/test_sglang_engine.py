from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.engine_suite import PROMPTS, EngineSuite, requests_for

pytest.importorskip("sglang", reason="SGLang is not installed: uv run nox -s sglang brings it")

from lightrft.engines.sglang import SGLangEngine


class TestSGLangEngine(EngineSuite):
    text_kinds = ("qwen2", "qwen2_tied", "qwen3")
    vision_kinds = ()
    spec_options: ClassVar[Mapping[str, Any]] = {"max_batch_size": 16}
    samples = 1500
    starts_slowly = True  # half a minute
    frees_kv_cache = False  # SGLang's sleep needs a GPU; on a CPU its cache is emptied, and stays

    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = SGLangEngine()
            engine.start(spec)
            return engine

        return make

    # SGLang refuses a least length where it has no tokenizer, and it has none: so do we, in words that help.
    def test_stop_tokens_wait_for_min_tokens(self, engine: RolloutEngine) -> None:
        with pytest.raises(ValueError, match="takes no min_tokens"):
            engine.generate(requests_for(PROMPTS[:1], SamplingParams(max_tokens=12, min_tokens=9)))

    test_min_tokens_keep_the_end_token_out_of_the_distribution = None
