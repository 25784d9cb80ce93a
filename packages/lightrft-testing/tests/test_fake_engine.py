from __future__ import annotations

from typing import Any

import pytest
import torch

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.errors import EngineStateError, RolloutError, WeightSyncError
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing.engine_suite import (
    GREEDY,
    PROMPTS,
    EngineContractSuite,
    hub_state,
    push_weights,
    requests_for,
    tokens_of,
)
from lightrft.testing.fake_engine import FakeEngine, Faults
from lightrft.testing.tiny_models import tiny_model


class TestFakeEngine(EngineContractSuite):
    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = FakeEngine()
            engine.start(spec)
            return engine

        return make


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen2", seed=1)


def started(**extra: Any) -> FakeEngine:
    engine = FakeEngine()
    engine.start(EngineSpec(extra=extra))
    return engine


def test_tokens_follow_prompt_seed_and_version(model: Any) -> None:
    engine = started()
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    first = tokens_of(engine.generate(requests_for(PROMPTS[:3], sampling, [1, 1, 2])))
    assert len({tuple(tokens) for tokens in first}) == 3
    assert tokens_of(engine.generate(requests_for(PROMPTS[:1], sampling, [2]))) != first[:1]
    assert tokens_of(started().generate(requests_for(PROMPTS[:3], sampling, [1, 1, 2]))) == first
    push_weights(engine, model, version=1)
    assert tokens_of(engine.generate(requests_for(PROMPTS[:3], sampling, [1, 1, 2]))) != first


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"lose_bucket": 1}, "were not sent"),
        ({"double_bucket": 1}, "was sent twice"),
        ({"truncate": "model.norm.weight"}, r"model\.norm\.weight is \(63,\)"),
        ({"misname": "model.norm.weight"}, r"model\.norm\.weight\.renamed was not announced"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_on_the_way_is_found_by_the_bookkeeping(model: Any, faults: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        push_weights(started(faults=faults), model, version=1, bucket_bytes=30_000)


@pytest.mark.parametrize("fault", [Faults(stale=True), Faults(alter="model.norm.weight")], ids=["stale", "alter"])
def test_a_fault_inside_shows_only_when_weights_are_read_back(model: Any, fault: Faults) -> None:
    engine, state = started(faults=fault), hub_state(model)
    assert push_weights(engine, model, version=1) is not None
    held = engine.sample_weights({"model.norm.weight": torch.tensor([63])})["model.norm.weight"]
    assert not torch.equal(held, state["model.norm.weight"][-1:])


def test_a_hanging_engine_ends_with_the_deadline() -> None:
    engine = started(faults={"hang": True})
    with pytest.raises(TimeoutError, match="5 samples"):
        engine.generate(requests_for(PROMPTS, GREEDY), timeout=0.02)


def test_swallowed_outputs_are_counted() -> None:
    with pytest.raises(RolloutError, match="returned 3 of 5 outputs; missing are requests 3, 4"):
        started(faults={"fewer_outputs": 2}).generate(requests_for(PROMPTS, GREEDY))


def test_a_dead_engine_stays_dead() -> None:
    engine = started(faults={"die": True})
    with pytest.raises(RolloutError, match="died"):
        engine.generate(requests_for(PROMPTS, GREEDY))
    engine.faults.die = False
    with pytest.raises(EngineStateError, match="set up again"):
        engine.generate(requests_for(PROMPTS, GREEDY))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary_size; it has faults, vocab_size, eos_token_id"):
        started(vocabulary_size=3)
