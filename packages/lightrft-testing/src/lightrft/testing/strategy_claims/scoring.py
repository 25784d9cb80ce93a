"""Reward models in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import ConfigError, PluginError, RolloutError
from lightrft.strategy.registry import register_scoring_engine
from lightrft.strategy.scoring import ScoringEngine

from .claims import StrategyClaims, on_ranks, refused


class WeighingEngine(ScoringEngine):
    """A stand-in whose score is the sum of the tokens; it scores nothing while it sleeps."""

    name: ClassVar[str] = "weighing"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    started: ClassVar[list[EngineSpec]] = []
    asleep = False
    batches = 0

    def start(self, spec: EngineSpec, group: Any = None, *, cuda_graphs: bool = False) -> None:
        self.started.append(spec)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        assert not self.asleep, "scoring while asleep"
        type(self).batches += 1
        return [float(sum(tokens)) for tokens in sequences if tokens != [404]]

    def release(self) -> None:
        self.asleep = True

    def restore(self) -> None:
        self.asleep = False

    def shutdown(self) -> None:
        self.asleep = True


class ScoringClaims(StrategyClaims):
    """setup_reward_engine."""

    def reward_engine(self, **settings: Any) -> Any:
        register_scoring_engine("weighing", WeighingEngine)
        return self.strategy(**settings).setup_reward_engine("rm", "weighing")

    @pytest.mark.parametrize("shared", [False, True])
    @on_ranks
    def test_each_rank_gets_the_scores_of_its_own_sequences(self, shared: bool) -> None:
        """With an engine per rank, or one of all ranks; ranks may have different numbers of sequences, or none."""
        strategy = self.strategy(engine_tp_size=self.world_size if shared else 1)
        register_scoring_engine("weighing", WeighingEngine)
        engine: Any = strategy.setup_reward_engine("rm", "weighing")
        assert WeighingEngine.started[-1].pretrain == "rm"
        mine = [[strategy.rank + 1, number] for number in range(2 * strategy.rank)]
        for _ in range(2):  # it slept in between
            assert engine.score(mine) == [float(strategy.rank + 1 + number) for number in range(2 * strategy.rank)]
            assert engine._engine.asleep, "it has memory only while it scores"

    @on_ranks
    def test_a_lost_score_is_an_error(self) -> None:
        engine = self.reward_engine(enable_engine_sleep=False)
        with refused(RolloutError, saying=["1 scores for 2 samples"]):
            engine.score([[1], [404]])
        assert not engine._engine.asleep, "nothing told it to sleep"

    @on_ranks
    def test_what_cannot_serve_a_reward_model_is_refused(self) -> None:
        strategy = self.strategy()
        with refused(PluginError, saying=["--rm_use_engine", "drop --rm_use_engine"]):
            strategy.setup_reward_engine("rm", "hf")
        if strategy.device.type == "cpu":
            with refused(ConfigError, saying=["--rm_engine_cudagraph", "no CUDA graphs on cpu"]):
                self.reward_engine(rm_engine_cudagraph=True)
