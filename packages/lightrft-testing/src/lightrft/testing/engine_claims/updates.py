"""Claims about weight updates: counts, refusals and their messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightrft.strategy.engine import RolloutEngine
from lightrft.strategy.errors import EngineStateError, NotBuiltError, WeightSyncError
from lightrft.strategy.weights import TensorSpec, WeightBucket, plan_buckets

from .claims import EngineClaims
from .parts import GREEDY, PROMPTS, hub_state, push_weights, requests_for, specs_of


class UpdateClaims(EngineClaims):
    """A complete update, or an error that says what is missing."""

    def test_outputs_carry_the_version_of_their_weights(self, engine: RolloutEngine, other_model: Any) -> None:
        assert engine.generate(requests_for(PROMPTS[:1], GREEDY))[0].weight_version == 0
        receipt = push_weights(engine, other_model, version=7)
        assert receipt is not None
        assert engine.generate(requests_for(PROMPTS[:1], GREEDY))[0].weight_version == 7

    def test_a_receipt_counts_what_came(self, engine: RolloutEngine, other_model: Any) -> None:
        receipt = push_weights(engine, other_model, version=1, bucket_bytes=40_000)
        assert receipt is not None
        assert receipt.tensors_received == receipt.tensors_expected == len(specs_of(other_model))
        assert receipt.nbytes == sum(spec.nbytes for spec in specs_of(other_model))
        assert receipt.buckets > 1

    def test_weights_can_be_read_back(self, engine: RolloutEngine, other_model: Any) -> None:
        if not engine.capabilities.readback:
            with pytest.raises(NotBuiltError):
                engine.sample_weights({})
            return
        push_weights(engine, other_model, version=1)
        state = hub_state(other_model)
        ends = {name: torch.tensor([0, tensor.numel() - 1]) for name, tensor in state.items()}
        mine = engine.local_positions(ends)
        for name, held in engine.sample_weights(mine).items():
            assert torch.equal(held, state[name].reshape(-1)[mine[name]]), name

    @pytest.mark.parametrize("wrong", ["missing", "unknown", "shape", "doubled"])
    def test_a_manifest_that_does_not_fit_is_refused_by_name(
        self, engine: RolloutEngine, other_model: Any, wrong: str
    ) -> None:
        specs = specs_of(other_model)
        victim = specs[3]
        altered = {
            "missing": [s for s in specs if s is not victim],
            "unknown": [*specs, TensorSpec(name="model.stranger.weight", shape=(2, 2), dtype=torch.float32)],
            "shape": [s if s is not victim else TensorSpec(name=s.name, shape=(3, 5), dtype=s.dtype) for s in specs],
            "doubled": [*specs, victim],
        }[wrong]
        named = {"unknown": "stranger", "doubled": "twice"}.get(wrong, victim.name.replace(".", r"\."))
        with pytest.raises(WeightSyncError, match=named):
            engine.begin_update(1, altered)
        if wrong == "doubled":  # the list alone shows it: the engine was not asked, and is unchanged
            engine.generate(requests_for(PROMPTS[:1], GREEDY))
        else:
            self._refuses_until_whole(engine, other_model)

    @pytest.mark.parametrize("fault", ["dropped", "doubled", "truncated", "misnamed"])
    def test_a_tensor_that_goes_wrong_on_the_way_is_named(
        self, engine: RolloutEngine, other_model: Any, fault: str
    ) -> None:
        state = hub_state(other_model)
        plan = engine.begin_update(1, specs_of(other_model), bucket_bytes=30_000)
        groups = plan_buckets(plan)
        assert len(groups) > 2
        victim = groups[1][-1].name

        def stream() -> None:
            for index, group in enumerate(groups):
                tensors = {s.name: state[s.name].to(s.dtype) for s in group}
                if fault == "dropped":
                    tensors.pop(victim, None)
                elif fault == "truncated" and victim in tensors:
                    tensors[victim] = tensors[victim][:-1]
                elif fault == "misnamed" and victim in tensors:
                    tensors[victim + "_"] = tensors.pop(victim)
                engine.load_bucket(WeightBucket(index, tensors))
                if fault == "doubled" and victim in tensors:
                    engine.load_bucket(WeightBucket(index, {victim: tensors[victim]}))
            engine.finish_update()

        with pytest.raises(WeightSyncError, match=victim.replace(".", r"\.")):
            stream()
        engine.abort_update()
        self._refuses_until_whole(engine, other_model)

    def test_an_interrupted_sync_refuses_generation_until_a_whole_one(
        self, engine: RolloutEngine, other_model: Any
    ) -> None:
        push_weights(engine, other_model, version=1, bucket_bytes=30_000, stop_after=2)
        with pytest.raises(EngineStateError, match="under way"):
            engine.generate(requests_for(PROMPTS[:1], GREEDY))
        engine.abort_update()
        self._refuses_until_whole(engine, other_model)

    def test_a_second_update_cannot_begin_inside_one(self, engine: RolloutEngine, other_model: Any) -> None:
        engine.begin_update(1, specs_of(other_model))
        with pytest.raises(EngineStateError, match="under way"):
            engine.begin_update(2, specs_of(other_model))

    def test_an_update_that_nobody_began_is_refused(self, engine: RolloutEngine) -> None:
        with pytest.raises(EngineStateError, match="begin_update"):
            engine.load_bucket(WeightBucket(0, {}))
        with pytest.raises(EngineStateError, match="begin_update"):
            engine.finish_update()
