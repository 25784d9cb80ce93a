"""The contract of rollout engines, as tests to subclass with one fixture.

An engine's tests are one class::

    class TestMyEngine(EngineSuite):
        @pytest.fixture
        def make_engine(self):
            def make(spec: EngineSpec) -> RolloutEngine:
                engine = MyEngine()
                engine.start(spec)
                return engine
            return make

:class:`EngineContractSuite` tests only the contract, so an engine without a model can pass it.
:class:`EngineSuite` adds that the engine equals Hugging Face, before and after every kind of sync.
"""

from __future__ import annotations

from .engine_claims.generation import GenerationClaims
from .engine_claims.images import ImageClaims
from .engine_claims.life import LifeClaims
from .engine_claims.parts import (
    GREEDY,
    PROMPTS,
    greedy_reference,
    hub_state,
    processed_logprobs,
    push_weights,
    requests_for,
    specs_of,
    tokens_of,
)
from .engine_claims.sleep import SleepClaims
from .engine_claims.sync import SyncClaims
from .engine_claims.text import TextClaims
from .engine_claims.updates import UpdateClaims

__all__ = [
    "GREEDY",
    "PROMPTS",
    "EngineContractSuite",
    "EngineSuite",
    "greedy_reference",
    "hub_state",
    "processed_logprobs",
    "push_weights",
    "requests_for",
    "specs_of",
    "tokens_of",
]


class EngineContractSuite(GenerationClaims, UpdateClaims, SleepClaims, LifeClaims):
    """The contract of every engine. Override the fixture ``make_engine``.

    :cvar spec_options: fields of :class:`EngineSpec` that this engine's tests need.
    :cvar starts_slowly: tests share one engine, which gets its first weights again, instead of starting their own.
    """


class EngineSuite(EngineContractSuite, TextClaims, SyncClaims, ImageClaims):
    """The contract, and equality with Hugging Face in fp32 on tiny models.

    :cvar text_kinds: models of :data:`lightrft.testing.tiny_models.CONFIGS` that the engine supports.
    :cvar vision_kinds: those with images; empty where ``capabilities.multimodal`` is False.
    :cvar starts_from_config: the engine can start without weights, from a configuration.
    :cvar samples: how many to draw for a distribution test.
    :cvar logprob_tolerance: largest difference of a logprob from a teacher-forced forward, in fp32.
    """
