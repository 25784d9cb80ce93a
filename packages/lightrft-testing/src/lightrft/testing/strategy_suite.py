"""The contract of training backends, as tests to subclass with one method.

::

    class TestMyStrategy(StrategySuite):
        world_size = 2

        @classmethod
        def make_strategy(cls, **settings):
            return MyStrategy(**settings)
"""

from __future__ import annotations

from .strategy_claims.checkpoints import CheckpointClaims
from .strategy_claims.claims import on_ranks
from .strategy_claims.collectives import CollectiveClaims
from .strategy_claims.data import DataClaims
from .strategy_claims.deadlines import DeadlineClaims
from .strategy_claims.failing_saves import FailingSaveClaims
from .strategy_claims.interface import InterfaceClaims
from .strategy_claims.memory import MemoryClaims
from .strategy_claims.meta_models import MetaModelClaims
from .strategy_claims.preparing import PreparingClaims
from .strategy_claims.rollout import RolloutClaims
from .strategy_claims.scoring import ScoringClaims
from .strategy_claims.training import TrainingClaims
from .strategy_claims.trajectories import TrajectoryClaims
from .strategy_claims.weights import WeightClaims

__all__ = ["StrategySuite", "on_ranks"]


class StrategySuite(
    InterfaceClaims,
    PreparingClaims,
    MetaModelClaims,
    TrainingClaims,
    TrajectoryClaims,
    CollectiveClaims,
    DataClaims,
    MemoryClaims,
    CheckpointClaims,
    FailingSaveClaims,
    WeightClaims,
    RolloutClaims,
    ScoringClaims,
    DeadlineClaims,
):
    """All claims about a strategy. Subclass it, set ``world_size`` and define ``make_strategy``.

    Each test runs on the ranks of a pool, which the ``rank_pools`` fixture of pytest keeps alive for the session.
    ``gradient_tolerance`` and ``weight_tolerance`` are the allowed rounding. Mark a claim that cannot hold in the
    subclass, with its reason, instead of overriding it with a weaker one::

        @pytest.mark.xfail(reason="...", strict=True)
        @on_ranks
        def test_...(self): ...
    """
