"""The states of a rollout engine: one state machine for all engines.

Weights are resident, offloaded (kept on the host), dropped (nothing is kept) or partial (an update is in progress or
was aborted). The KV cache is resident or released. Sleep levels follow from these: level 1 releases the KV cache and
offloads the weights, level 2 drops them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from .errors import EngineStateError, StaleWeightsError

Resource = Literal["weights", "kv_cache"]


class EngineStatus(Enum):
    """Whether an engine is asleep, by the documents' names."""

    SLEEPED = 0
    WAKEUP = 1


class Weights(Enum):
    """Where an engine's weights are."""

    ABSENT = "absent"  # an engine that starts without weights: the first update sends them
    RESIDENT = "resident"
    OFFLOADED = "offloaded"
    DROPPED = "dropped"
    PARTIAL = "partial"


class KVCache(Enum):
    """State of the KV cache."""

    RESIDENT = "resident"
    RELEASED = "released"


class Phase(Enum):
    """What an engine is doing."""

    ABSENT = "absent"
    READY = "ready"
    SYNCING = "syncing"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """A snapshot of an engine's state. ``version`` is that of the last complete weight update (0: as loaded)."""

    phase: Phase = Phase.ABSENT
    weights: Weights = Weights.ABSENT
    kv_cache: KVCache = KVCache.RELEASED
    version: int = 0

    @property
    def status(self) -> EngineStatus:
        awake = self.phase is not Phase.ABSENT and self.kv_cache is KVCache.RESIDENT
        return EngineStatus.WAKEUP if awake else EngineStatus.SLEEPED

    def __str__(self) -> str:
        return (
            f"{self.phase.value}, weights {self.weights.value}, KV cache {self.kv_cache.value}, version {self.version}"
        )


class Lifecycle:
    """Checks the transitions of an engine. An illegal one raises; a repeated one returns that there is nothing to
    do."""

    def __init__(self) -> None:
        self.state = EngineState()

    def started(self, *, has_weights: bool) -> None:
        if self.state.phase is not Phase.ABSENT:
            raise EngineStateError(f"start: the engine is already started ({self.state})")
        self.state = EngineState(
            phase=Phase.READY, weights=Weights.RESIDENT if has_weights else Weights.ABSENT, kv_cache=KVCache.RESIDENT
        )

    def check_generate(self) -> None:
        """:raises StaleWeightsError: the weights are incomplete. :raises EngineStateError: asleep, syncing or
        absent."""
        self._require_phase("generate", Phase.READY)
        if self.state.weights in (Weights.DROPPED, Weights.PARTIAL, Weights.ABSENT):
            raise StaleWeightsError(
                f"generate: the engine's weights are {self.state.weights.value}; send a complete update first: "
                "strategy.update_engine_weights(actor)"
            )
        if self.state.weights is Weights.OFFLOADED or self.state.kv_cache is KVCache.RELEASED:
            raise EngineStateError(
                f"generate: the engine is asleep ({self.state}); call wakeup_inference_engine() first"
            )

    def released(self, what: Resource, *, keep: bool) -> bool:
        """Note a release. Returns False if there was nothing to release."""
        self._require_phase(f"release {what}", Phase.READY)
        if what == "kv_cache":
            if self.state.kv_cache is KVCache.RELEASED:
                return False
            self.state = replace(self.state, kv_cache=KVCache.RELEASED)
            return True
        held = self.state.weights
        if held is Weights.RESIDENT or (held is Weights.OFFLOADED and not keep):
            self.state = replace(self.state, weights=Weights.OFFLOADED if keep else Weights.DROPPED)
            return True
        if held is Weights.PARTIAL:  # a complete update is needed anyway
            self.state = replace(self.state, weights=Weights.DROPPED)
            return True
        return False

    def restored(self, what: Resource) -> bool:
        """Note a restoration. Returns False if the resource was there already."""
        self._require_phase(f"restore {what}", Phase.READY)
        if what == "kv_cache":
            if self.state.kv_cache is KVCache.RESIDENT:
                return False
            self.state = replace(self.state, kv_cache=KVCache.RESIDENT)
            return True
        if self.state.weights is Weights.OFFLOADED:
            self.state = replace(self.state, weights=Weights.RESIDENT)
            return True
        if self.state.weights is Weights.DROPPED:  # memory is back, the values are not
            self.state = replace(self.state, weights=Weights.PARTIAL)
            return True
        return False

    def update_begun(self) -> None:
        self._require_phase("begin a weight update", Phase.READY)
        if self.state.weights in (Weights.OFFLOADED, Weights.DROPPED):
            raise EngineStateError(f"begin a weight update: restore the weights' memory first ({self.state})")
        self.state = replace(self.state, phase=Phase.SYNCING, weights=Weights.PARTIAL)

    def update_finished(self, version: int) -> None:
        self._require_phase("finish a weight update", Phase.SYNCING)
        self.state = replace(self.state, phase=Phase.READY, weights=Weights.RESIDENT, version=version)

    def update_aborted(self) -> None:
        """The weights stay partial: the engine generates again only after a complete update."""
        if self.state.phase is Phase.SYNCING:
            self.state = replace(self.state, phase=Phase.READY)

    def failed(self) -> None:
        self.state = replace(self.state, phase=Phase.FAILED)

    def stopped(self) -> None:
        self.state = EngineState()

    def _require_phase(self, move: str, phase: Phase) -> None:
        if self.state.phase is not phase:
            hint = {
                Phase.ABSENT: "start it first: strategy.setup_inference_engine(args, engine_type=args.engine_type)",
                Phase.SYNCING: "a weight update is under way: finish it or abort it",
                Phase.FAILED: "it failed and must be shut down and set up again",
                Phase.READY: "call begin_update first",
            }[self.state.phase]
            raise EngineStateError(f"{move}: the engine is {self.state.phase.value}; {hint}")
