"""Claims about an engine's memory: released, restored, and what is allowed in between."""

from __future__ import annotations

from typing import Any

import pytest

from lightrft.strategy.engine import RolloutEngine
from lightrft.strategy.errors import EngineStateError, StaleWeightsError
from lightrft.strategy.lifecycle import EngineStatus
from lightrft.strategy.sampling import SamplingParams

from .claims import EngineClaims, put_to_sleep, wake
from .parts import GREEDY, PROMPTS, push_weights, requests_for, specs_of, tokens_of


class SleepClaims(EngineClaims):
    """Sleep frees memory; after waking the output is the same."""

    def test_sleep_and_wake_give_the_same_output(self, engine: RolloutEngine) -> None:
        before = tokens_of(engine.generate(requests_for(PROMPTS, GREEDY)))
        put_to_sleep(engine, keep=True)
        assert engine.status().status is EngineStatus.SLEEPED
        with pytest.raises(EngineStateError, match="asleep"):
            engine.generate(requests_for(PROMPTS, GREEDY))
        wake(engine)
        assert engine.status().status is EngineStatus.WAKEUP
        assert tokens_of(engine.generate(requests_for(PROMPTS, GREEDY))) == before

    def test_sleep_may_come_right_after_an_answer(self, engine: RolloutEngine) -> None:
        for _ in range(20):  # the engine may not have removed its last batch yet
            engine.generate(requests_for(PROMPTS[:1], SamplingParams(max_tokens=1)))
            put_to_sleep(engine, keep=True)
            wake(engine)

    def test_sleeping_and_waking_twice_does_nothing_more(self, engine: RolloutEngine) -> None:
        put_to_sleep(engine, keep=True)
        asleep = engine.status()
        assert engine.release("kv_cache") == 0
        assert engine.release("weights") == 0
        assert engine.status() == asleep
        wake(engine)
        awake = engine.status()
        wake(engine)
        assert engine.status() == awake

    def test_releasing_the_cache_frees_it(self, engine: RolloutEngine) -> None:
        engine.generate(requests_for(PROMPTS, GREEDY))
        freed = engine.release("kv_cache")
        assert (freed > 0) == (engine.spec.device.type not in engine.capabilities.keeps_kv_cache_on)

    def test_dropped_weights_refuse_generation_until_a_whole_update(
        self, engine: RolloutEngine, other_model: Any
    ) -> None:
        if 2 not in engine.capabilities.sleep_levels:
            pytest.skip(f"engine {engine.name} says that it has no sleep level 2 (capabilities.sleep_levels)")
        freed = put_to_sleep(engine, keep=False)
        assert freed > 0
        with pytest.raises(StaleWeightsError, match="update_engine_weights"):
            engine.generate(requests_for(PROMPTS, GREEDY))
        engine.restore("weights")
        with pytest.raises(StaleWeightsError):
            engine.generate(requests_for(PROMPTS, GREEDY))
        push_weights(engine, other_model, version=3)
        engine.restore("kv_cache")
        assert len(engine.generate(requests_for(PROMPTS, GREEDY))) == len(PROMPTS)

    def test_a_sleeping_engine_takes_no_update(self, engine: RolloutEngine, other_model: Any) -> None:
        put_to_sleep(engine, keep=True)
        with pytest.raises(EngineStateError, match="restore"):
            engine.begin_update(1, specs_of(other_model))

    def test_weights_come_while_the_cache_is_released(self, engine: RolloutEngine, other_model: Any) -> None:
        put_to_sleep(engine, keep=True)
        engine.restore("weights")
        push_weights(engine, other_model, version=1)
        engine.restore("kv_cache")
        assert engine.generate(requests_for(PROMPTS[:1], GREEDY))[0].weight_version == 1
