from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightrft.strategy.errors import EngineStateError, StaleWeightsError
from lightrft.strategy.lifecycle import EngineState, EngineStatus, KVCache, Lifecycle, Phase, Weights


class AnyOrderOfMoves(RuleBasedStateMachine):
    """Whatever is called in whatever order, the engine never generates with weights that are not whole."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Lifecycle()
        # The model: what is really in memory.
        self.started = self.syncing = self.failed = False
        self.whole = False  # the values are complete and current
        self.memory = self.host = self.cache = False
        self.version = 0

    @property
    def ready(self) -> bool:
        return self.started and not self.syncing and not self.failed

    @rule(has_weights=st.booleans())
    def start(self, has_weights: bool) -> None:
        if self.started:
            with pytest.raises(EngineStateError, match="already started"):
                self.life.started(has_weights=has_weights)
            return
        self.life.started(has_weights=has_weights)
        self.started, self.whole, self.memory, self.cache, self.host = True, has_weights, True, True, False
        self.version = 0

    @rule()
    def generate(self) -> None:
        if not self.ready:
            with pytest.raises(EngineStateError):
                self.life.check_generate()
        elif not self.whole:
            with pytest.raises(StaleWeightsError, match="update_engine_weights"):
                self.life.check_generate()
        elif not self.memory or not self.cache:
            with pytest.raises(EngineStateError, match="asleep"):
                self.life.check_generate()
        else:
            self.life.check_generate()

    @rule(keep=st.booleans())
    def release_weights(self, keep: bool) -> None:
        if not self.ready:
            with pytest.raises(EngineStateError):
                self.life.released("weights", keep=keep)
            return
        if self.life.released("weights", keep=keep):
            self.host = self.whole and keep
            self.whole, self.memory = self.host, False
        again = self.life.released("weights", keep=keep)
        assert not again, "a repeated release does nothing"

    @rule()
    def release_cache(self) -> None:
        if not self.ready:
            with pytest.raises(EngineStateError):
                self.life.released("kv_cache", keep=True)
            return
        assert self.life.released("kv_cache", keep=True) == self.cache
        self.cache = False

    @rule()
    def restore_weights(self) -> None:
        if not self.ready:
            with pytest.raises(EngineStateError):
                self.life.restored("weights")
            return
        if self.life.restored("weights"):
            assert not self.memory
            self.memory, self.host = True, False
        assert not self.life.restored("weights"), "a repeated restore does nothing"

    @rule()
    def restore_cache(self) -> None:
        if not self.ready:
            with pytest.raises(EngineStateError):
                self.life.restored("kv_cache")
            return
        assert self.life.restored("kv_cache") == (not self.cache)
        self.cache = True

    @rule()
    def begin_update(self) -> None:
        if not self.ready or not self.memory:
            with pytest.raises(EngineStateError):
                self.life.update_begun()
            return
        self.life.update_begun()
        self.syncing, self.whole = True, False

    @rule(version=st.integers(1, 1000))
    def finish_update(self, version: int) -> None:
        if not self.started or not self.syncing or self.failed:
            with pytest.raises(EngineStateError):
                self.life.update_finished(version)
            return
        self.life.update_finished(version)
        self.syncing, self.whole, self.version = False, True, version

    @rule()
    def abort_update(self) -> None:
        self.life.update_aborted()
        if not self.failed:
            self.syncing = False

    @precondition(lambda self: self.started)
    @rule()
    def fail(self) -> None:
        self.life.failed()
        self.failed = True

    @rule()
    def stop(self) -> None:
        self.life.stopped()
        self.started = self.syncing = self.failed = self.whole = self.memory = self.host = self.cache = False
        self.version = 0

    @invariant()
    def the_state_says_what_is(self) -> None:
        state = self.life.state
        assert (state.phase is Phase.ABSENT) == (not self.started)
        if self.started:
            assert state.version == self.version
            assert (state.kv_cache is KVCache.RESIDENT) == self.cache
            assert (state.status is EngineStatus.WAKEUP) == self.cache
            assert (state.weights is Weights.OFFLOADED) == self.host
            assert (state.weights in (Weights.RESIDENT, Weights.OFFLOADED)) == self.whole
        assert str(state)


AnyOrderOfMoves.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrderOfMoves = AnyOrderOfMoves.TestCase


def ready(*, has_weights: bool = True) -> Lifecycle:
    life = Lifecycle()
    life.started(has_weights=has_weights)
    return life


def test_the_documents_status_has_two_members() -> None:
    assert {status.name: status.value for status in EngineStatus} == {"SLEEPED": 0, "WAKEUP": 1}


def test_an_engine_that_is_not_there_sleeps() -> None:
    assert EngineState().status is EngineStatus.SLEEPED


def test_dropped_weights_come_back_as_memory_only() -> None:
    """A level-2 sleep whose wake-up restores garbage is how a run goes stale unnoticed."""
    life = ready()
    life.released("weights", keep=False)
    life.restored("weights")
    assert life.state.weights is Weights.PARTIAL
    with pytest.raises(StaleWeightsError, match="partial"):
        life.check_generate()


def test_kept_weights_can_still_be_dropped() -> None:
    life = ready()
    assert life.released("weights", keep=True)
    assert life.released("weights", keep=False)
    assert life.state.weights is Weights.DROPPED


def test_an_aborted_update_leaves_the_weights_partial() -> None:
    life = ready()
    life.update_begun()
    life.update_aborted()
    assert life.state.weights is Weights.PARTIAL
    life.update_begun()
    life.update_finished(1)
    life.check_generate()


def test_a_second_update_cannot_begin_inside_one() -> None:
    life = ready()
    life.update_begun()
    with pytest.raises(EngineStateError, match="under way"):
        life.update_begun()


@pytest.mark.parametrize(
    ("prepare", "hint"),
    [
        (lambda life: None, "setup_inference_engine"),
        (lambda life: (life.started(has_weights=True), life.update_begun()), "finish it or abort it"),
        (lambda life: (life.started(has_weights=True), life.failed()), "set up again"),
    ],
)
def test_an_illegal_move_says_what_to_do(prepare: object, hint: str) -> None:
    life = Lifecycle()
    prepare(life)  # type: ignore[operator]
    with pytest.raises(EngineStateError, match=hint):
        life.check_generate()
