"""What every rollout engine promises, as tests to subclass with one fixture.

An engine's tests are one class::

    class TestMyEngine(EngineSuite):
        @pytest.fixture
        def make_engine(self):
            def make(spec: EngineSpec) -> RolloutEngine:
                engine = MyEngine()
                engine.start(spec)
                return engine
            return make

:class:`EngineContractSuite` asks for nothing but the contract, so an engine without a model passes it too.
:class:`EngineSuite` adds what makes an engine right: it equals Hugging Face, before and after every kind of sync.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

from lightrft.strategy.engine import EngineSpec, GenerationOutput, GenerationRequest, RolloutEngine
from lightrft.strategy.errors import EngineStateError, NotBuiltError, RolloutError, StaleWeightsError, WeightSyncError
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.lifecycle import EngineState, EngineStatus, KVCache, Phase, Weights
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.weights import SyncReceipt, TensorSpec, WeightBucket, plan_buckets

from .tiny_models import EOS, TEXT_KINDS, VISION_KINDS, save_tiny_model, tiny_image, tiny_model, tiny_processor

MakeEngine = Callable[[EngineSpec], RolloutEngine]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
# Another length for each, one alone, and two prompts that are the same.
PROMPTS = (
    (17, 301, 42, 7),
    (9,),
    (100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116),
    (17, 301, 42, 7),
    (500, 11, 250),
)
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


# ---- what the tests are made of --------------------------------------------------------------------------------------
def hub_state(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors under their hub names: views of its own memory."""
    layout, sources = HubLayout(model), dict(hub_sources(model))
    return {name: tensor.view(sources[tensor.source].detach()) for name, tensor in layout.by_name.items()}


def specs_of(model: Any) -> list[TensorSpec]:
    """What a trainer that holds ``model`` would announce."""
    return HubLayout(model).specs


def push_weights(
    engine: RolloutEngine,
    model: Any,
    version: int,
    *,
    bucket_bytes: int = 2**20,
    order: Callable[[list[WeightBucket]], Sequence[WeightBucket]] = list,
    stop_after: int | None = None,
) -> SyncReceipt | None:
    """Stream a model's weights into an engine, as a strategy would; every bucket's memory is spoiled once it was taken.

    :param bucket_bytes: 1 sends each atom (each of the engine's fused groups) alone.
    :param order: in which order buckets leave. :param stop_after: give up after this many, without an abort.
    """
    state = hub_state(model)
    plan = engine.begin_update(version, specs_of(model), bucket_bytes=bucket_bytes)
    groups = plan_buckets(plan)
    buckets = [
        WeightBucket(i, {s.name: state[s.name].to(s.dtype, copy=True).contiguous() for s in group})
        for i, group in enumerate(groups)
    ]
    for sent, bucket in enumerate(order(buckets)):
        if sent == stop_after:
            return None
        engine.load_bucket(bucket)
        for tensor in bucket.tensors.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return engine.finish_update()


def requests_for(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int] | None = None
) -> list[GenerationRequest]:
    """One request a prompt, each with its own seed."""
    seeds = range(len(prompts)) if seeds is None else seeds
    return [
        GenerationRequest(prompt_token_ids=tuple(prompt), sampling=replace(sampling, seed=seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def tokens_of(outputs: Sequence[GenerationOutput]) -> list[list[int]]:
    """The output tokens alone."""
    return [output.output_token_ids for output in outputs]


@torch.no_grad()
def greedy_reference(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation by ``model.generate``, one prompt alone, without an end token."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def processed_logprobs(
    model: Any, output: GenerationOutput, sampling: SamplingParams, *, barred: Sequence[int] = ()
) -> list[torch.Tensor]:
    """For each output token the log distribution that it had to be drawn from, by one teacher-forced forward.

    Written plainly, token by token, so that it shares nothing with an engine's own code.
    """
    start = len(output.prompt_token_ids)
    ids = torch.tensor([[*output.prompt_token_ids, *output.output_token_ids]])
    logits = model(ids).logits[0, start - 1 : -1].double()
    rows = []
    for at, row in enumerate(logits):
        row = row / (sampling.temperature or 1.0)
        if at < sampling.min_tokens:
            row[list(barred)] = -torch.inf
        if sampling.min_p > 0:
            row[row < row.max() + math.log(sampling.min_p)] = -torch.inf
        ranked = row.argsort(descending=True)
        if sampling.top_k > 0:
            row[ranked[sampling.top_k :]] = -torch.inf
        if sampling.top_p < 1:
            mass = row.softmax(-1)[ranked]
            row[ranked[(mass.cumsum(0) - mass) >= sampling.top_p]] = -torch.inf
        rows.append(row.log_softmax(-1))
    return rows


class _Engines:
    """Engines that tests share: each test finds its own as it was loaded.

    :param slow: to start: a used one gets its first weights again instead of being started anew.
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
            if engine.status() == _AS_STARTED:
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
    if engine.status() != _AS_STARTED:
        push_weights(engine, _model(Path(folder).name), version=1)
        engine.restore("kv_cache")
        engine.lifecycle.state = _AS_STARTED


_AS_STARTED = EngineState(phase=Phase.READY, weights=Weights.RESIDENT, kv_cache=KVCache.RESIDENT)
_ENGINES = pytest.StashKey[_Engines]()
_FOLDERS = pytest.StashKey[dict[str, str]]()


@functools.cache
def _model(kind: str, seed: int = 0) -> Any:
    """A tiny model that several tests look at and none changes."""
    return tiny_model(kind, seed=seed)


# ---- the contract ----------------------------------------------------------------------------------------------------
class EngineContractSuite:
    """What holds for every engine. Override the fixture ``make_engine``.

    :cvar spec_options: fields of :class:`EngineSpec` that this engine's tests need.
    :cvar starts_slowly: tests share one engine, which gets its first weights again, rather than start their own.
    """

    spec_options: ClassVar[Mapping[str, Any]] = {}
    starts_slowly: ClassVar[bool] = False

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        """Override this."""
        raise NotImplementedError("override make_engine: it returns a function from EngineSpec to a started engine")

    @pytest.fixture
    def folders(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
        """Folder of a tiny model by kind, written once a session."""
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
        return _model("qwen2", 1)

    @pytest.fixture
    def engines(self, request: pytest.FixtureRequest, make_engine: MakeEngine) -> _Engines:
        """Started engines by folder, shared by the tests of a class and shut down after its last."""
        node = request.node.getparent(pytest.Class)
        assert node is not None
        if (engines := node.stash.get(_ENGINES, None)) is None:
            engines = node.stash[_ENGINES] = _Engines(self.starts_slowly)
            node.addfinalizer(engines.close)
        engines.make = lambda folder: make_engine(self.spec(folder))
        return engines

    @pytest.fixture
    def engine(self, engines: _Engines, model_folder: str) -> RolloutEngine:
        """A started engine that is as it was loaded."""
        return engines.fresh(model_folder)

    def spec(self, folder: str | None, **options: Any) -> EngineSpec:
        """The spec under which this suite starts an engine."""
        return EngineSpec(**{"pretrain": folder, "max_model_len": 256, **self.spec_options, **options})

    # ---- generation --------------------------------------------------------------------------------------------------
    def test_outputs_come_in_the_order_of_the_requests(self, engine: RolloutEngine) -> None:
        outputs = engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=5)))
        assert [tuple(o.prompt_token_ids) for o in outputs] == list(PROMPTS)
        assert all(1 <= len(o.output_token_ids) <= 5 for o in outputs)

    def test_every_token_has_a_logprob(self, engine: RolloutEngine) -> None:
        if not engine.capabilities.logprobs:
            pytest.skip(f"engine {engine.name} says that it returns no logprobs (capabilities.logprobs)")
        for output in engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=5))):
            assert output.logprobs is not None
            assert len(output.logprobs) == len(output.output_token_ids)
            assert all(value <= 1e-6 for value in output.logprobs)

    def test_logprobs_that_nobody_asked_for_are_none(self, engine: RolloutEngine) -> None:
        outputs = engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=3, logprobs=False)))
        assert [o.logprobs for o in outputs] == [None] * len(PROMPTS)

    def test_no_requests_give_no_outputs(self, engine: RolloutEngine) -> None:
        assert engine.generate([]) == []

    def test_poll_returns_what_was_submitted(self, engine: RolloutEngine) -> None:
        first = engine.submit(requests_for(PROMPTS[:2], GREEDY))
        second = engine.submit(requests_for(PROMPTS[2:], GREEDY))
        assert [o.request_id for o in engine.poll("all")] == [*first, *second]
        assert engine.poll("all") == []

    def test_aborted_requests_say_so(self, engine: RolloutEngine) -> None:
        ids = engine.submit(requests_for(PROMPTS, GREEDY))
        engine.abort(ids[:1])
        outputs = {o.request_id: o for o in engine.poll("all")}
        assert set(outputs) == set(ids)
        assert outputs[ids[0]].finish_reason in ("abort", "length")  # it may have been finished already
        assert all(outputs[i].finish_reason == "length" for i in ids[1:])

    def test_the_same_request_gives_the_same_sample(self, engine: RolloutEngine) -> None:
        self._needs_seeds(engine)
        requests = requests_for(PROMPTS, SamplingParams(max_tokens=8))
        assert tokens_of(engine.generate(requests)) == tokens_of(engine.generate(requests))

    def test_a_sample_does_not_depend_on_its_batch(self, engine: RolloutEngine) -> None:
        self._needs_seeds(engine)
        requests = requests_for(PROMPTS * 4, SamplingParams(max_tokens=8))
        together = tokens_of(engine.generate(requests))
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(3)).tolist()
        shuffled = tokens_of(engine.generate([requests[i] for i in order]))
        assert [shuffled[order.index(i)] for i in range(len(requests))] == together
        assert [tokens_of(engine.generate([request]))[0] for request in requests[:6]] == together[:6]

    def test_samples_of_one_prompt_differ_by_seed(self, engine: RolloutEngine) -> None:
        outputs = engine.generate(requests_for([PROMPTS[0]] * 16, SamplingParams(max_tokens=8, ignore_eos=True)))
        assert len({tuple(tokens) for tokens in tokens_of(outputs)}) > 8

    def test_max_tokens_ends_with_length(self, engine: RolloutEngine) -> None:
        for output in engine.generate(requests_for(PROMPTS, GREEDY)):
            assert (len(output.output_token_ids), output.finish_reason) == (12, "length")

    def test_each_request_has_its_own_length(self, engine: RolloutEngine) -> None:
        requests = [
            GenerationRequest(
                prompt_token_ids=prompt, sampling=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=3 + 4 * i)
            )
            for i, prompt in enumerate(PROMPTS)
        ]
        assert [len(tokens) for tokens in tokens_of(engine.generate(requests))] == [3, 7, 11, 15, 19]

    def test_a_stop_token_ends_the_response_and_is_its_last_token(self, engine: RolloutEngine) -> None:
        whole = tokens_of(engine.generate(requests_for(PROMPTS[:1], GREEDY)))[0]
        stop = whole[5]
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop, 511))
        output = engine.generate(requests_for(PROMPTS[:1], sampling))[0]
        assert output.output_token_ids == whole[: whole.index(stop) + 1]
        assert output.finish_reason == "stop"

    def test_stop_tokens_wait_for_min_tokens(self, engine: RolloutEngine) -> None:
        stops = tuple(dict.fromkeys(tokens_of(engine.generate(requests_for(PROMPTS[:1], GREEDY)))[0]))
        sampling = SamplingParams(
            temperature=0.0, max_tokens=12, min_tokens=9, ignore_eos=True, stop_token_ids=stops[:4]
        )
        output = engine.generate(requests_for(PROMPTS[:1], sampling))[0]
        assert len(output.output_token_ids) >= 9
        assert not set(output.output_token_ids[:9]) & set(stops[:4])

    def test_the_context_ends_a_response_with_length(self, make_engine: MakeEngine, model_folder: str) -> None:
        engine = make_engine(self.spec(model_folder, max_model_len=32))
        try:
            sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
            output = engine.generate(requests_for([PROMPTS[2]], sampling))[0]
            assert (len(output.output_token_ids), output.finish_reason) == (32 - len(PROMPTS[2]), "length")
            with pytest.raises(ValueError, match="context of 32"):
                engine.generate(requests_for([(5,) * 32], GREEDY))
            assert len(engine.generate(requests_for(PROMPTS[:1], GREEDY))) == 1
        finally:
            engine.shutdown()

    def test_random_state_of_the_process_is_left_alone(self, engine: RolloutEngine) -> None:
        before = torch.get_rng_state()
        engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=6)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_starting_leaves_the_random_state_alone(self, make_engine: MakeEngine, model_folder: str) -> None:
        before = torch.get_rng_state()
        engine = make_engine(self.spec(model_folder))
        try:
            assert torch.equal(torch.get_rng_state(), before)
        finally:
            engine.shutdown()

    def test_a_missed_deadline_is_a_timeout(self, engine: RolloutEngine) -> None:
        with pytest.raises(TimeoutError):
            engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True)), timeout=0.0)
        assert len(engine.generate(requests_for(PROMPTS[:1], GREEDY))) == 1

    # ---- weights -----------------------------------------------------------------------------------------------------
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
        if wrong == "doubled":  # the list alone shows it: the engine was not asked, and holds what it held
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

    # ---- memory ------------------------------------------------------------------------------------------------------
    def test_sleep_and_wake_give_the_same_output(self, engine: RolloutEngine) -> None:
        before = tokens_of(engine.generate(requests_for(PROMPTS, GREEDY)))
        _sleep(engine, keep=True)
        assert engine.status().status is EngineStatus.SLEEPED
        with pytest.raises(EngineStateError, match="asleep"):
            engine.generate(requests_for(PROMPTS, GREEDY))
        _wake(engine)
        assert engine.status().status is EngineStatus.WAKEUP
        assert tokens_of(engine.generate(requests_for(PROMPTS, GREEDY))) == before

    def test_sleeping_and_waking_twice_does_nothing_more(self, engine: RolloutEngine) -> None:
        _sleep(engine, keep=True)
        asleep = engine.status()
        assert engine.release("kv_cache") == 0
        assert engine.release("weights") == 0
        assert engine.status() == asleep
        _wake(engine)
        awake = engine.status()
        _wake(engine)
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
        freed = _sleep(engine, keep=False)
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
        _sleep(engine, keep=True)
        with pytest.raises(EngineStateError, match="restore"):
            engine.begin_update(1, specs_of(other_model))

    def test_weights_come_while_the_cache_is_released(self, engine: RolloutEngine, other_model: Any) -> None:
        _sleep(engine, keep=True)
        engine.restore("weights")
        push_weights(engine, other_model, version=1)
        engine.restore("kv_cache")
        assert engine.generate(requests_for(PROMPTS[:1], GREEDY))[0].weight_version == 1

    # ---- life --------------------------------------------------------------------------------------------------------
    def test_an_engine_that_was_not_started_refuses_everything(self, engine: RolloutEngine) -> None:
        idle = type(engine)()
        with pytest.raises(EngineStateError, match="start it first"):
            idle.generate(requests_for(PROMPTS[:1], GREEDY))
        with pytest.raises(EngineStateError, match="start it first"):
            idle.release("kv_cache")
        idle.shutdown()

    def test_shutdown_ends_everything_and_repeats(self, make_engine: MakeEngine, model_folder: str) -> None:
        engine = make_engine(self.spec(model_folder))
        engine.generate(requests_for(PROMPTS[:1], GREEDY))
        engine.shutdown()
        engine.shutdown()
        assert engine.status() == EngineState()
        with pytest.raises(EngineStateError):
            engine.generate(requests_for(PROMPTS[:1], GREEDY))

    def test_shutdown_leaves_no_process_thread_or_shared_memory(
        self, make_engine: MakeEngine, model_folder: str
    ) -> None:
        warm = make_engine(self.spec(model_folder))  # what a library starts once for good is not a leak
        warm.generate(requests_for(PROMPTS[:1], GREEDY))
        warm.shutdown()
        before, processes = _remains(), _descendants()
        engine = make_engine(self.spec(model_folder))
        engine.generate(requests_for(PROMPTS[:1], GREEDY))
        family = _descendants() - processes
        engine.shutdown()
        left = {kind: items - before[kind] for kind, items in _remains().items()}
        left["shared memory"] = _leaked(left["shared memory"])
        left["processes"] = _survivors(family | (_descendants() - processes))
        assert left == {kind: set() for kind in left}

    def test_tensor_parallelism_it_lacks_is_refused_with_the_way_out(
        self, engine: RolloutEngine, model_folder: str
    ) -> None:
        if engine.capabilities.tensor_parallel:
            return
        with pytest.raises(NotBuiltError, match="engine_tp_size"):
            type(engine)().start(self.spec(model_folder, tensor_parallel_size=2))

    def test_a_device_it_lacks_is_refused(self, engine: RolloutEngine, model_folder: str) -> None:
        with pytest.raises(NotBuiltError, match="does not run on"):
            type(engine)().start(self.spec(model_folder, device=torch.device("meta")))

    # ---- helpers -----------------------------------------------------------------------------------------------------
    def _needs_seeds(self, engine: RolloutEngine) -> None:
        if not engine.capabilities.seeds:
            pytest.skip(f"engine {engine.name} says that it honours no seeds here (capabilities.seeds)")

    def _refuses_until_whole(self, engine: RolloutEngine, model: Any) -> None:
        with pytest.raises(StaleWeightsError):
            engine.generate(requests_for(PROMPTS[:1], GREEDY))
        push_weights(engine, model, version=9)
        assert engine.generate(requests_for(PROMPTS[:1], GREEDY))[0].weight_version == 9


# ---- right, not merely well-behaved ----------------------------------------------------------------------------------
class EngineSuite(EngineContractSuite):
    """The contract, and equality with Hugging Face in fp32 on tiny models.

    :cvar text_kinds: models of :data:`lightrft.testing.tiny_models.CONFIGS` that the engine serves.
    :cvar vision_kinds: those with images; empty where ``capabilities.multimodal`` is False.
    :cvar samples: how many to draw for a distribution test.
    :cvar logprob_tolerance: largest difference of a logprob from a teacher-forced forward, in fp32.
    """

    text_kinds: ClassVar[Sequence[str]] = TEXT_KINDS
    vision_kinds: ClassVar[Sequence[str]] = VISION_KINDS
    samples: ClassVar[int] = 3000
    logprob_tolerance: ClassVar[float] = 1e-5

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Tests that take ``kind`` run once for each text model, those with ``vision_kind`` for each other one.

        The scope lets pytest run all tests of one model before those of the next, which share its engine.
        """
        if "vision_kind" in metafunc.fixturenames:
            metafunc.parametrize("vision_kind", self.vision_kinds, scope="class")
        elif "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", self.text_kinds, scope="class")

    # ---- text --------------------------------------------------------------------------------------------------------
    def test_greedy_equals_hugging_face(self, engines: _Engines, folders: Any, kind: str) -> None:
        self._check_greedy(engines.fresh(folders(kind)), _model(kind))

    def test_sampled_logprobs_equal_a_teacher_forced_forward(self, engines: _Engines, folders: Any, kind: str) -> None:
        engine, model = engines.fresh(folders(kind)), _model(kind)
        for temperature in (1.0, 0.7):
            sampling = SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True)
            for output in engine.generate(requests_for(PROMPTS, sampling)):
                self._check_logprobs(model, output, sampling)

    @pytest.mark.parametrize(
        "truncation",
        [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.01}],
        ids=["top_k", "top_p", "min_p", "all"],
    )
    def test_truncated_logprobs_are_renormalised(self, engine: RolloutEngine, truncation: Mapping[str, Any]) -> None:
        model = _model("qwen2")
        sampling = SamplingParams(temperature=1.3, max_tokens=12, ignore_eos=True, **truncation)
        for output in engine.generate(requests_for(PROMPTS, sampling)):
            self._check_logprobs(model, output, sampling)

    def test_min_tokens_keep_the_end_token_out_of_the_distribution(self, engine: RolloutEngine) -> None:
        model = _model("qwen2")
        sampling = SamplingParams(temperature=2.0, max_tokens=8, min_tokens=8)
        for output in engine.generate(requests_for(PROMPTS * 8, sampling)):
            assert len(output.output_token_ids) == 8
            self._check_logprobs(model, output, sampling, barred=(EOS,))

    def test_greedy_logprobs_are_the_models_own(self, engine: RolloutEngine) -> None:
        model = _model("qwen2")
        for output in engine.generate(requests_for(PROMPTS, GREEDY)):
            self._check_logprobs(model, output, GREEDY)

    def test_the_models_end_token_stops_unless_ignored(self, engines: _Engines, folders: Any) -> None:
        engine, model = engines.fresh(folders("qwen2")), _model("qwen2")
        sampling = SamplingParams(temperature=2.0, max_tokens=60)
        outputs = engine.generate(requests_for(PROMPTS * 20, sampling))
        stopped = [o for o in outputs if o.finish_reason == "stop"]
        assert stopped, "in 100 samples of 60 tokens at this temperature some must end"
        assert all(o.output_token_ids.index(EOS) == len(o.output_token_ids) - 1 for o in stopped)
        assert all(EOS not in o.output_token_ids for o in outputs if o.finish_reason == "length")
        self._check_logprobs(model, stopped[0], sampling)

    @pytest.mark.parametrize(
        "truncation",
        [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}],
        ids=["plain", "temperature", "top_k", "top_p", "min_p"],
    )
    def test_samples_follow_the_distribution(self, engine: RolloutEngine, truncation: Mapping[str, Any]) -> None:
        """Chi-square over the first token of many samples; new seeds would fail by chance once in about a million."""
        model, count = _model("qwen2"), self.samples
        sampling = SamplingParams(**{"temperature": 1.0, "max_tokens": 1, "ignore_eos": True, **truncation})
        outputs = engine.generate(requests_for([PROMPTS[0]] * count, sampling, [7919 * i + 5 for i in range(count)]))
        expected = processed_logprobs(model, outputs[0], sampling)[0].exp() * count
        seen = torch.bincount(torch.tensor([o.output_token_ids[0] for o in outputs]), minlength=len(expected)).double()
        assert not seen[expected == 0].any(), "a token outside the truncated distribution was drawn"
        statistic, freedom = _chi_square(seen, expected)
        assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 10

    # ---- sync --------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("cut", ["all at once", "one tensor a bucket", "odd sizes", "shuffled"])
    def test_after_a_sync_greedy_equals_the_new_model(
        self, engines: _Engines, folders: Any, kind: str, cut: str
    ) -> None:
        engine, new = engines.fresh(folders(kind)), _model(kind, 1)
        sizes = {"all at once": 2**40, "one tensor a bucket": 1, "odd sizes": 12_345, "shuffled": 20_000}
        generator = torch.Generator().manual_seed(5)

        def shuffled(buckets: list[WeightBucket]) -> list[WeightBucket]:
            return [buckets[i] for i in torch.randperm(len(buckets), generator=generator).tolist()]

        engine.generate(requests_for(PROMPTS, GREEDY))  # so that there are caches to forget
        receipt = push_weights(
            engine, new, version=1, bucket_bytes=sizes[cut], order=shuffled if cut == "shuffled" else list
        )
        assert receipt is not None
        assert (receipt.buckets == 1) == (cut == "all at once")
        self._check_weights(engine, new)
        self._check_greedy(engine, new)

    def test_three_syncs_in_a_row(self, engine: RolloutEngine) -> None:
        for version in (1, 2, 3):
            new = _model("qwen2", version)
            push_weights(engine, new, version=version, bucket_bytes=25_000)
            self._check_weights(engine, new)
            assert {o.weight_version for o in self._check_greedy(engine, new)} == {version}

    @pytest.mark.parametrize("level", [1, 2])
    def test_a_sync_into_a_sleeping_engine_brings_the_new_model(
        self, engine: RolloutEngine, other_model: Any, level: int
    ) -> None:
        """As a strategy does it: the weights' memory first, the KV cache last."""
        if level not in engine.capabilities.sleep_levels:
            pytest.skip(f"engine {engine.name} says that it has no sleep level {level} (capabilities.sleep_levels)")
        engine.generate(requests_for(PROMPTS, GREEDY))
        _sleep(engine, keep=level == 1)
        engine.restore("weights")
        push_weights(engine, other_model, version=1, bucket_bytes=30_000)
        engine.restore("kv_cache")
        self._check_weights(engine, other_model)
        self._check_greedy(engine, other_model)

    def test_a_whole_sync_after_a_broken_one_brings_the_new_model(
        self, engine: RolloutEngine, other_model: Any
    ) -> None:
        push_weights(engine, other_model, version=1, bucket_bytes=30_000, stop_after=2)
        engine.abort_update()
        new = _model("qwen2", 2)
        push_weights(engine, new, version=2, bucket_bytes=30_000)
        self._check_weights(engine, new)
        self._check_greedy(engine, new)

    def test_good_weights_after_nan_weights_give_good_outputs(self, engine: RolloutEngine, other_model: Any) -> None:
        broken = tiny_model("qwen2", seed=2)
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(float("nan"))
        push_weights(engine, broken, version=1)
        try:
            outputs = engine.generate(requests_for(PROMPTS, GREEDY))
        except RolloutError:
            pass  # to say so at once is the better answer
        else:
            assert len(outputs) == len(PROMPTS)
        push_weights(engine, other_model, version=2)
        self._check_greedy(engine, other_model)

    def test_born_without_weights_it_waits_for_the_first_update(
        self, make_engine: MakeEngine, folders: Any, kind: str
    ) -> None:
        if not self._starts_from_config:
            pytest.skip("this engine starts from a folder only (its suite sets _starts_from_config to False)")
        model = _model(kind, 1)
        engine = make_engine(self.spec(None, model_config=model.config))
        try:
            with pytest.raises(StaleWeightsError, match="absent"):
                engine.generate(requests_for(PROMPTS, GREEDY))
            push_weights(engine, model, version=1)
            self._check_greedy(engine, model)
        finally:
            engine.shutdown()

    _starts_from_config: ClassVar[bool] = True

    # ---- images ------------------------------------------------------------------------------------------------------
    def test_images_equal_hugging_face(self, engines: _Engines, folders: Any, vision_kind: str) -> None:
        engine, model = self._vision(engines, folders, vision_kind), _model(vision_kind)
        prompts = _image_prompts()
        expected = [_image_reference(vision_kind, model, text, images) for text, images in prompts]
        by_text = [GenerationRequest(prompt=text, images=images, sampling=GREEDY) for text, images in prompts]
        tokenizer = tiny_processor(vision_kind).tokenizer
        by_ids = [
            GenerationRequest(prompt_token_ids=tuple(tokenizer(text)["input_ids"]), images=images, sampling=GREEDY)
            for text, images in prompts
        ]
        for requests in (by_text, by_ids, [*by_text, *by_ids]):
            outputs = engine.generate(requests)
            wanted = expected * (len(requests) // len(prompts))
            assert [(o.prompt_token_ids, o.output_token_ids) for o in outputs] == wanted

    def test_a_sync_forgets_what_was_computed_from_images(
        self, engines: _Engines, folders: Any, vision_kind: str
    ) -> None:
        engine, new = self._vision(engines, folders, vision_kind), _model(vision_kind, 1)
        text, images = _image_prompts()[0]
        request = [GenerationRequest(prompt=text, images=images, sampling=GREEDY)]
        before = tokens_of(engine.generate(request))
        push_weights(engine, new, version=1, bucket_bytes=50_000)
        after = tokens_of(engine.generate(request))
        assert after == [_image_reference(vision_kind, new, text, images)[1]]
        assert after != before

    def test_images_and_placeholders_must_match(self, engines: _Engines, folders: Any, vision_kind: str) -> None:
        engine = self._vision(engines, folders, vision_kind)
        request = GenerationRequest(prompt=PLACEHOLDER + "two?", images=(tiny_image(0), tiny_image(1)), sampling=GREEDY)
        with pytest.raises(ValueError, match="placeholder"):
            engine.generate([request])
        assert len(engine.generate(requests_for(PROMPTS[:1], GREEDY))) == 1

    def test_images_for_a_text_model_are_refused(self, engine: RolloutEngine) -> None:
        request = GenerationRequest(prompt_token_ids=PROMPTS[0], images=(object(),), sampling=GREEDY)
        with pytest.raises(ValueError, match="no images"):
            engine.generate([request])

    # ---- helpers -----------------------------------------------------------------------------------------------------
    def _vision(self, engines: _Engines, folders: Any, kind: str) -> RolloutEngine:
        pytest.importorskip("torchvision", reason="the processors need it: pip install torchvision pillow")
        return engines.fresh(folders(kind))

    def _check_weights(self, engine: RolloutEngine, model: Any) -> None:
        """Every element that this rank's part of the engine holds."""
        if not engine.capabilities.readback:
            return
        state = hub_state(model)
        mine = engine.local_positions({name: torch.arange(tensor.numel()) for name, tensor in state.items()})
        assert any(len(positions) for positions in mine.values())
        for name, held in engine.sample_weights(mine).items():
            assert torch.equal(held, state[name].reshape(-1)[mine[name]]), name

    def _check_greedy(self, engine: RolloutEngine, model: Any) -> list[GenerationOutput]:
        outputs = engine.generate(requests_for(PROMPTS, GREEDY))
        assert tokens_of(outputs) == [greedy_reference(model, prompt, 12) for prompt in PROMPTS]
        return outputs

    def _check_logprobs(
        self, model: Any, output: GenerationOutput, sampling: SamplingParams, barred: Sequence[int] = ()
    ) -> None:
        expected = processed_logprobs(model, output, sampling, barred=barred)
        assert output.logprobs is not None
        for row, token, logprob in zip(expected, output.output_token_ids, output.logprobs, strict=True):
            assert abs(float(row[token]) - logprob) <= self.logprob_tolerance


def _sleep(engine: RolloutEngine, *, keep: bool) -> int:
    return engine.release("kv_cache") + engine.release("weights", keep=keep)


def _wake(engine: RolloutEngine) -> None:
    engine.restore("weights")
    engine.restore("kv_cache")


def _remains() -> dict[str, set[str]]:
    """Threads and shared memory of this process, as far as this system shows them."""
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "shared memory": _shared_memory(),
    }


def _shared_memory() -> set[str]:
    shared = Path("/dev/shm")
    return {file.name for file in shared.iterdir()} if shared.is_dir() else set()


def _leaked(names: set[str], seconds: float = 5.0) -> set[str]:
    """Shared memory that stays and is nobody else's: others make and drop theirs while this test looks."""
    late = time.monotonic() + seconds
    while (left := names & _shared_memory() - _held_by_others()) and time.monotonic() < late:
        time.sleep(0.05)
    return left


def _held_by_others() -> set[str]:
    """Shared memory that processes have mapped which this test did not start: tests beside it, programs of anybody."""
    ours, held = f"PYTEST_CURRENT_TEST={os.environ['PYTEST_CURRENT_TEST']}", set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if process.name != str(os.getpid()) and ours not in (process / "environ").read_text(errors="replace"):
                held |= set(re.findall(r"/dev/shm/(\S+)", (process / "maps").read_text()))
    return held


def _descendants() -> set[psutil.Process]:
    """The processes that this one started, and theirs."""
    return set(psutil.Process().children(recursive=True))


def _survivors(processes: Iterable[psutil.Process], seconds: float = 5.0) -> set[str]:
    """Those that still run after so long: a killed one takes a moment, and one that lost its parent has new ones."""
    late = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < late:
        time.sleep(0.05)
    return {str(process) for process in alive}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _chi_square(seen: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells below 5 expected samples are pooled."""
    rare = expected < 5
    cells = [(seen[~rare], expected[~rare])]
    if rare.any() and float(expected[rare].sum()) > 0:
        cells.append((seen[rare].sum().reshape(1), expected[rare].sum().reshape(1)))
    observed, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return float(((observed - wanted) ** 2 / wanted).sum()), max(len(wanted) - 1, 1)


def _image_prompts() -> list[tuple[str, tuple[Any, ...]]]:
    """One image, two in one prompt, one image twice, none."""
    wide, small, tall = tiny_image(1, 112, 56), tiny_image(2, 56, 56), tiny_image(3, 56, 84)
    return [
        (f"{PLACEHOLDER}describe the picture", (wide,)),
        (f"first {PLACEHOLDER} and then {PLACEHOLDER} which is larger", (small, wide)),
        (f"{PLACEHOLDER}{PLACEHOLDER}", (tall, tall)),
        ("a prompt without any picture", ()),
    ]


@torch.no_grad()
def _image_reference(kind: str, model: Any, text: str, images: Sequence[Any]) -> tuple[list[int], list[int]]:
    batch = tiny_processor(kind)(text=[text], images=list(images) or None, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    length = batch["input_ids"].shape[1]
    return out[0, :length].tolist(), out[0, length:].tolist()
