"""Claims about an engine after a weight sync: it is the new model, however the weights were sent."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from lightrft.strategy.engine import RolloutEngine
from lightrft.strategy.errors import RolloutError, StaleWeightsError
from lightrft.strategy.weights import WeightBucket

from ..tiny_models import tiny_model
from .claims import MakeEngine, SharedEngines, put_to_sleep
from .hugging_face import HuggingFaceClaims
from .parts import GREEDY, PROMPTS, push_weights, requests_for, shared_model


class SyncClaims(HuggingFaceClaims):
    """In any buckets, repeated, asleep, after a failed one, after NaN."""

    starts_from_config: ClassVar[bool] = True

    @pytest.mark.parametrize("cut", ["all at once", "one tensor a bucket", "odd sizes", "shuffled"])
    def test_after_a_sync_greedy_equals_the_new_model(
        self, engines: SharedEngines, folders: Any, kind: str, cut: str
    ) -> None:
        engine, new = engines.fresh(folders(kind)), shared_model(kind, 1)
        sizes = {"all at once": 2**40, "one tensor a bucket": 1, "odd sizes": 12_345, "shuffled": 20_000}
        generator = torch.Generator().manual_seed(5)

        def shuffled(buckets: list[WeightBucket]) -> list[WeightBucket]:
            return [buckets[i] for i in torch.randperm(len(buckets), generator=generator).tolist()]

        engine.generate(requests_for(PROMPTS, GREEDY))  # so that there are caches to clear
        receipt = push_weights(
            engine, new, version=1, bucket_bytes=sizes[cut], order=shuffled if cut == "shuffled" else list
        )
        assert receipt is not None
        assert (receipt.buckets == 1) == (cut == "all at once")
        self._check_weights(engine, new)
        self._check_greedy(engine, new)

    def test_three_syncs_in_a_row(self, engine: RolloutEngine) -> None:
        for version in (1, 2, 3):
            new = shared_model("qwen2", version)
            push_weights(engine, new, version=version, bucket_bytes=25_000)
            self._check_weights(engine, new)
            assert {o.weight_version for o in self._check_greedy(engine, new)} == {version}

    @pytest.mark.parametrize("level", [1, 2])
    def test_a_sync_into_a_sleeping_engine_brings_the_new_model(
        self, engine: RolloutEngine, other_model: Any, level: int
    ) -> None:
        """As a strategy does it: wake the weights first, the KV cache last."""
        if level not in engine.capabilities.sleep_levels:
            pytest.skip(f"engine {engine.name} says that it has no sleep level {level} (capabilities.sleep_levels)")
        engine.generate(requests_for(PROMPTS, GREEDY))
        put_to_sleep(engine, keep=level == 1)
        engine.restore("weights")
        push_weights(engine, other_model, version=1, bucket_bytes=30_000)
        engine.restore("kv_cache")
        self._check_weights(engine, other_model)
        self._check_greedy(engine, other_model)

    def test_a_whole_sync_after_a_broken_one_brings_the_new_model(
        self, engine: RolloutEngine, other_model: Any
    ) -> None:
        push_weights(engine, other_model, version=1, bucket_bytes=30_000, stop_after=2)
        engine.abort_update()
        new = shared_model("qwen2", 2)
        push_weights(engine, new, version=2, bucket_bytes=30_000)
        self._check_weights(engine, new)
        self._check_greedy(engine, new)

    def test_good_weights_after_nan_weights_give_good_outputs(self, engine: RolloutEngine, other_model: Any) -> None:
        broken = tiny_model("qwen2", seed=2)
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(float("nan"))
        push_weights(engine, broken, version=1)
        try:
            outputs = engine.generate(requests_for(PROMPTS, GREEDY))
        except RolloutError:
            pass  # to say so at once is the better answer
        else:
            assert len(outputs) == len(PROMPTS)
        push_weights(engine, other_model, version=2)
        self._check_greedy(engine, other_model)

    def test_born_without_weights_it_waits_for_the_first_update(
        self, make_engine: MakeEngine, folders: Any, kind: str
    ) -> None:
        if not self.starts_from_config:
            pytest.skip("this engine starts from a folder only (its suite sets starts_from_config to False)")
        model = shared_model(kind, 1)
        engine = make_engine(self.spec(None, model_config=model.config))
        try:
            with pytest.raises(StaleWeightsError, match="absent"):
                engine.generate(requests_for(PROMPTS, GREEDY))
            push_weights(engine, model, version=1)
            self._check_greedy(engine, model)
        finally:
            engine.shutdown()
