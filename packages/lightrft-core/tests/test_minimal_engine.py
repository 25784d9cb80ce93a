from __future__ import annotations

import pytest
import torch

from lightrft.strategy.engine import EngineSpec, GenerationRequest
from lightrft.strategy.errors import StaleWeightsError
from lightrft.strategy.minimal_engine import MinimalEngine
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.weights import TensorSpec, WeightBucket

SPECS = [TensorSpec(name="a", shape=(2,), dtype=torch.float32), TensorSpec(name="b", shape=(1,), dtype=torch.int64)]


def started(**spec: object) -> MinimalEngine:
    engine = MinimalEngine()
    engine.start(EngineSpec(pretrain="any", **spec))  # type: ignore[arg-type]
    return engine


def tokens(engine: MinimalEngine, prompt: tuple[int, ...] = (7, 9, 11), **sampling: object) -> list[int]:
    params = SamplingParams(**{"max_tokens": 12, "seed": 1, **sampling})  # type: ignore[arg-type]
    return engine.generate([GenerationRequest(prompt_token_ids=prompt, sampling=params)])[0].output_token_ids


def push(engine: MinimalEngine, version: int) -> None:
    plan = engine.begin_update(version, SPECS)
    values = {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.int64)}
    engine.load_bucket(WeightBucket(0, {s.name: values[s.name].to(s.dtype) for s in plan.specs}))
    engine.finish_update()


def test_answers_are_made_of_the_prompts_tokens_and_repeat() -> None:
    engine = started()
    assert set(tokens(engine)) <= {7, 9, 11}
    assert tokens(engine) == tokens(engine) == tokens(started())
    assert tokens(engine, seed=2) != tokens(engine)
    assert tokens(engine, temperature=0.0, seed=2) == tokens(engine, temperature=0.0, seed=1), "greedy has no seed"


def test_answers_change_with_the_weights() -> None:
    engine = started()
    before = tokens(engine)
    push(engine, 1)
    assert tokens(engine) != before
    assert engine.sample_weights({"a": torch.tensor([1])})["a"].tolist() == [1.0]


def test_stop_tokens_end_a_response_but_not_before_min_tokens() -> None:
    engine = started()
    first = tokens(engine)[0]
    assert tokens(engine, stop_token_ids=(first,)) == [first]
    waited = tokens(engine, stop_token_ids=(first,), min_tokens=4)
    assert len(waited) >= 4
    assert first not in waited[:4]


def test_the_context_ends_a_response() -> None:
    engine = started(max_model_len=5)
    assert len(tokens(engine)) == 2
    with pytest.raises(ValueError, match="leaves no room"):
        tokens(engine, prompt=(1, 2, 3, 4, 5))


def test_it_needs_no_model_to_start_and_whole_weights_to_go_on() -> None:
    engine = started()
    push(engine, 1)
    engine.release("weights", keep=False)
    engine.restore("weights")
    with pytest.raises(StaleWeightsError):
        tokens(engine)
    push(engine, 2)
    assert tokens(engine)
    engine.shutdown()
    engine.shutdown()
