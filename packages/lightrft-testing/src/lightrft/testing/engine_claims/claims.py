"""Engines for tests: the fixtures of every claim, and common steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.errors import StaleWeightsError
from lightrft.strategy.lifecycle import EngineState, KVCache, Phase, Weights

from ..tiny_models import save_tiny_model
from .parts import GREEDY, PROMPTS, push_weights, requests_for, shared_model

MakeEngine = Callable[[EngineSpec], RolloutEngine]


class SharedEngines:
    """Engines that tests share: each test gets one that is as it was loaded.

    :param slow: they start slowly: a used one gets its first weights again instead of being restarted.
    """

    def __init__(self, slow: bool) -> None:
        self.make: Callable[[str], RolloutEngine] | None = None
        self._slow = slow
        self._engine: RolloutEngine | None = None
        self._folder = ""

    def fresh(self, folder: str) -> RolloutEngine:
        """An engine on ``folder`` in the state in which it started."""
        engine = self._engine
        if engine is not None and folder == self._folder:
            if self._slow and engine.status().phase is not Phase.FAILED:
                _renew(engine, folder)
            if engine.status() == AS_STARTED:
                return engine
        self.close()
        assert self.make is not None
        self._engine, self._folder = self.make(folder), folder
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None


def _renew(engine: RolloutEngine, folder: str) -> None:
    """Bring a used engine into the state in which it started."""
    engine.abort_update()
    engine.poll("all")
    engine.restore("weights")
    if engine.status() != AS_STARTED:
        push_weights(engine, shared_model(Path(folder).name), version=1)
        engine.restore("kv_cache")
        engine.lifecycle.state = AS_STARTED


AS_STARTED = EngineState(phase=Phase.READY, weights=Weights.RESIDENT, kv_cache=KVCache.RESIDENT)
_ENGINES = pytest.StashKey[SharedEngines]()
_FOLDERS = pytest.StashKey[dict[str, str]]()


class EngineClaims:
    """Fixtures, and what an engine's test class may set. Override the fixture ``make_engine``."""

    spec_options: ClassVar[Mapping[str, Any]] = {}
    starts_slowly: ClassVar[bool] = False

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        """Override this."""
        raise NotImplementedError("override make_engine: it returns a function from EngineSpec to a started engine")

    @pytest.fixture
    def folders(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
        """Folder of a tiny model by kind, written once per session."""
        made = request.session.stash.setdefault(_FOLDERS, {})

        def folder(kind: str) -> str:
            if kind not in made:
                made[kind] = save_tiny_model(kind, tmp_path_factory.mktemp("tiny") / kind)
            return made[kind]

        return folder

    @pytest.fixture
    def model_folder(self, folders: Callable[[str], str]) -> str:
        """The model that most tests use."""
        return folders("qwen2")

    @pytest.fixture
    def other_model(self) -> Any:
        """A model of the same shape with other weights."""
        return shared_model("qwen2", 1)

    @pytest.fixture
    def engines(self, request: pytest.FixtureRequest, make_engine: MakeEngine) -> SharedEngines:
        """Started engines by folder, shared by the tests of a class and shut down after its last."""
        node = request.node.getparent(pytest.Class)
        assert node is not None
        if (engines := node.stash.get(_ENGINES, None)) is None:
            engines = node.stash[_ENGINES] = SharedEngines(self.starts_slowly)
            node.addfinalizer(engines.close)
        engines.make = lambda folder: make_engine(self.spec(folder))
        return engines

    @pytest.fixture
    def engine(self, engines: SharedEngines, model_folder: str) -> RolloutEngine:
        """A started engine that is as it was loaded."""
        return engines.fresh(model_folder)

    def spec(self, folder: str | None, **options: Any) -> EngineSpec:
        """The spec under which this suite starts an engine."""
        return EngineSpec(**{"pretrain": folder, "max_model_len": 256, **self.spec_options, **options})

    def _refuses_until_whole(self, engine: RolloutEngine, model: Any) -> None:
        with pytest.raises(StaleWeightsError):
            engine.generate(requests_for(PROMPTS[:1], GREEDY))
        push_weights(engine, model, version=9)
        assert engine.generate(requests_for(PROMPTS[:1], GREEDY))[0].weight_version == 9


def put_to_sleep(engine: RolloutEngine, *, keep: bool) -> int:
    """Release cache and weights; returns the bytes freed. ``keep``: the weights are moved to the host."""
    return engine.release("kv_cache") + engine.release("weights", keep=keep)


def wake(engine: RolloutEngine) -> None:
    """Restore all that sleep has released."""
    engine.restore("weights")
    engine.restore("kv_cache")
