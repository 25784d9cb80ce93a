"""Sharded actors feed the rollout engines: the same tokens from every backend and engine, or an error that says why.

An engine that is not installed in this environment skips its rows: `uv run nox -s vllm_integration` brings vLLM,
`uv run nox -s sglang_integration` brings SGLang.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch

from lightrft.models.lora import add_adapters
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.strategy.errors import RolloutError, StaleWeightsError, WeightSyncError
from lightrft.strategy.lifecycle import EngineStatus
from lightrft.strategy.prompts import make_prompts, make_requests
from lightrft.strategy.registry import load_plugin
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing import RankPool, faulty_sync, tiny_model
from lightrft.testing.engine_suite import (
    GREEDY,
    PROMPTS,
    greedy_reference,
    hub_state,
    processed_logprobs,
    push_weights,
    tokens_of,
)
from lightrft.testing.tiny_models import save_tiny_model, set_adapters


class Engine(NamedTuple):
    """One row of the table: an engine, and over how many ranks it splits the model."""

    name: str
    size: int

    @property
    def settings(self) -> dict[str, Any]:
        extra = {"kv_cache_memory_bytes": 8 * 2**20} if self.name == "vllm" else {}
        return {"engine_type": self.name, "engine_tp_size": self.size, "engine_extra": extra}


ENGINES = (Engine("hf", 1), Engine("vllm", 1), Engine("vllm", 2), Engine("sglang", 1), Engine("sglang", 2))
INSTALLED_WITH: Mapping[str, str] = {"vllm": "vllm_integration", "sglang": "sglang_integration"}
BACKENDS: Mapping[str, Mapping[str, Any]] = {"FSDP2": {"fsdp": True}, "ZeRO 3": {"zero_stage": 3}}
SETTINGS: Mapping[str, Any] = {
    "micro_train_batch_size": 1,
    "train_batch_size": 2,
    "max_model_len": 128,
    "prompt_max_len": 64,
    "verify_weights": "full",
    "weight_bucket_mb": 0.05,  # several buckets
}
# What only a long campaign adds to the table: adapters are merged before an engine sees them; and an engine of one rank
# reads from ZeRO 3 what one over both ranks does.
FULL = [(backend, engine, True) for backend in BACKENDS for engine in ENGINES if (backend, engine.size) != ("FSDP2", 1)]
FULL.append(("ZeRO 3", Engine("vllm", 1), False))
# One that is split over ranks shows what happens between them, and inside each what happens in one that is not.
SPLIT = [pytest.param(engine, marks=[pytest.mark.full] if engine == ("vllm", 1) else []) for engine in ENGINES]
SHARES = (slice(0, 4), slice(4, None))  # uneven
SAMPLED = SamplingParams(n=2, max_tokens=12)


def installed(engine: Engine) -> Engine:
    """Skip where the engine's library is missing."""
    if engine.name in INSTALLED_WITH and find_spec(engine.name) is None:
        pytest.skip(f"{engine.name} is not installed: uv run nox -s {INSTALLED_WITH[engine.name]} brings it")
    return engine


def cell(engine: Engine) -> str:
    return f"{engine.name}, TP {engine.size}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that engines load; the actors have other weights of the same shape."""
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("tiny") / "qwen2")


def adapted() -> Any:
    """A model with LoRA adapters, other than the one that engines load."""
    model = tiny_model("qwen2", seed=1)
    add_adapters(model, "generator", rank=4)
    return set_adapters(model)


def started(backend: str, engine: Engine, folder: str, lora: bool = False, **settings: Any) -> tuple[Any, Any]:
    """A strategy with an engine that the sharded actor has fed, by the documents' calls."""
    engine = Engine(*engine)  # ranks get a plain tuple: this module has no name there
    args = {**SETTINGS, **BACKENDS[backend], **engine.settings, "pretrain": folder, **settings}
    strategy = get_strategy(args)
    strategy.setup_distributed()
    actor = strategy.prepare_model(adapted() if lora else tiny_model("qwen2", seed=1))
    strategy.setup_inference_engine(strategy.args, engine_type=engine.name, actor=actor)
    return strategy, actor


def generated(strategy: Any, *, sleep: bool = False) -> list[Any]:
    share = PROMPTS[SHARES[strategy.rank]]
    return strategy.gather_and_generate(GREEDY, all_prompt_token_ids=share, sleep_engine=sleep)


def samples(strategy: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of two samples a prompt; all calls draw as if they were the run's first."""
    outputs = strategy.gather_and_generate(SAMPLED, all_prompt_token_ids=prompts, sleep_engine=False, step=0)
    return [(output.prompt_token_ids, output.output_token_ids) for output in outputs]


@functools.cache
def samples_of_one_process(engine: str, folder: str) -> list[tuple[list[int], list[int]]]:
    """What an engine without ranks writes for all prompts."""
    alone: RolloutEngine = load_plugin("engines", engine)()
    extra = Engine(engine, 1).settings["engine_extra"]
    alone.start(EngineSpec(pretrain=folder, max_model_len=SETTINGS["max_model_len"], extra=extra))
    try:
        push_weights(alone, tiny_model("qwen2", seed=1), version=1)
        prompts = [replace(prompt, index=i) for i, prompt in enumerate(make_prompts(PROMPTS, None, None, None))]
        outputs = alone.generate(make_requests(prompts, SAMPLED, StrategyConfig().seed, 0))
        return [(output.prompt_token_ids, output.output_token_ids) for output in outputs]
    finally:
        alone.shutdown()


# ---- the table -------------------------------------------------------------------------------------------------------
def sleeps_beside_another(strategy: Any, folder: str) -> None:
    """The strategy's engine and an embedded one: one call puts both to sleep, one wakes both."""
    other = get_strategy({"fsdp": True, "engine_type": "hf", "pretrain": folder, "train_batch_size": 2})
    engines = [strategy.inference_engine, other.setup_inference_engine(other.args, engine_type="hf")]
    for act, status in (
        (strategy.engines_wake_up, EngineStatus.WAKEUP),
        (strategy.engines_sleep, EngineStatus.SLEEPED),
        (strategy.engines_wake_up, EngineStatus.WAKEUP),
    ):
        act(engines)
        assert {engine.status().status for engine in engines if engine is not None} == {status}
    other.engine_host.shutdown()


def fed(backend: str, engine: Engine, folder: str, lora: bool) -> tuple[list[list[int]], float, list[Any], list[Any]]:
    """Greedy tokens for this rank's prompts, and the largest distance of their logprobs from a plain forward's.

    Then the samples of two rollouts: of this rank's share, and where the first rank brings no prompt and the last all.
    """
    strategy, _ = started(backend, engine, folder, lora)
    outputs = generated(strategy, sleep=True)
    assert strategy.inference_engine_status is EngineStatus.SLEEPED
    sleeps_beside_another(strategy, folder)
    assert tokens_of(generated(strategy)) == tokens_of(outputs), "it slept in between"
    assert {output.weight_version for output in outputs} == {1}
    plain, error = adapted() if lora else tiny_model("qwen2", seed=1), 0.0
    for output in outputs:
        for row, token, logprob in zip(
            processed_logprobs(plain, output, GREEDY), output.output_token_ids, output.logprobs or (), strict=True
        ):
            error = max(error, abs(float(row[token]) - logprob))
    drawn = [samples(strategy, PROMPTS[SHARES[strategy.rank]]), samples(strategy, PROMPTS if strategy.rank else ())]
    strategy.engine_host.shutdown()
    return tokens_of(outputs), error, *drawn


CELLS = [
    pytest.param(
        *row, id=f"{row[0]}, {cell(row[1])}{', LoRA' * row[2]}", marks=[pytest.mark.full] if row in FULL else []
    )
    for row in itertools.product(BACKENDS, ENGINES, (False, True))
]


@pytest.mark.parametrize(("backend", "engine", "lora"), CELLS)
def test_table_of_backends_and_engines(ranks: RankPool, folder: str, backend: str, engine: Engine, lora: bool) -> None:
    """The rows of docs/equivalence.md: ``-k table -rP`` prints them."""
    results = ranks.run(fed, backend, tuple(installed(engine)), folder, lora)
    model = adapted() if lora else tiny_model("qwen2", seed=1)
    expected = [greedy_reference(model, prompt, 12) for prompt in PROMPTS]
    written = [tokens for result in results for tokens in result[0]]
    equal = sum(mine == other for mine, other in zip(written, expected, strict=True))
    error = max(result[1] for result in results)
    sys.stdout.write(f"| {backend}{', LoRA' * lora} | {cell(engine)} | {equal} of {len(expected)} | {error:.1e} |\n")
    assert equal == len(expected)
    assert error < 1e-5
    # Order and counts with uneven shares and with none; a sample depends neither on the ranks nor on the split.
    shared, of_last = ([sample for result in results for sample in result[at]] for at in (2, 3))
    assert results[0][3] == []
    assert [prompt for prompt, _ in shared] == [list(prompt) for prompt in PROMPTS for _ in range(SAMPLED.n)]
    assert shared == of_last
    assert len({tuple(response) for _, response in shared}) > len(PROMPTS)
    if not lora:
        assert shared == samples_of_one_process(engine.name, folder)


# ---- faults on the way -----------------------------------------------------------------------------------------------
VICTIM = "model.layers.1.self_attn.k_proj.weight"  # inside a module that engines fuse
FAULTS = ("dropped", "doubled", "truncated", "misnamed", "stale")


def faulted(backend: str, engine: Engine, folder: str) -> dict[str, str]:
    """What each fault, injected where the last engine is, says on this rank; a good sync must mend everything."""
    strategy, actor = started(backend, engine, folder)
    owns = strategy.inference_engine is not None
    victim = max(rank for rank, there in enumerate(strategy.all_gather_object(owns)) if there)
    said = {}
    for seed, fault in enumerate(FAULTS, start=2):
        new = tiny_model("qwen2", seed=seed)
        strategy.import_weights(actor, iter(hub_state(new).items()))
        try:
            if strategy.rank == victim:
                with faulty_sync(strategy, fault, VICTIM):
                    strategy.update_engine_weights(actor)
            else:
                strategy.update_engine_weights(actor)
        except WeightSyncError as error:
            said[fault] = str(error)
        # On both: no rank may take its own part for whole. One without an engine hears of it.
        with pytest.raises(StaleWeightsError if owns else RolloutError, match="update_engine_weights"):
            generated(strategy)
        strategy.update_engine_weights(actor)
        share = PROMPTS[SHARES[strategy.rank]]
        assert tokens_of(generated(strategy)) == [greedy_reference(new, prompt, 12) for prompt in share], fault
    strategy.engine_host.shutdown()
    return said


@pytest.mark.parametrize("engine", SPLIT, ids=cell)
def test_a_fault_on_the_way_is_named_on_every_rank(ranks: RankPool, folder: str, engine: Engine) -> None:
    for said in ranks.run(faulted, "FSDP2", tuple(installed(engine)), folder):
        assert set(said) == set(FAULTS)
        for fault, text in said.items():
            assert VICTIM in text, f"{fault}: {text}"


def held_back(engine: Engine, folder: str) -> tuple[str, str]:
    """An engine that acknowledges a tensor and keeps its old values, verified by samples alone."""
    strategy, actor = started("FSDP2", engine, folder, verify_weights="sampled")
    strategy.import_weights(actor, iter(hub_state(tiny_model("qwen2", seed=2)).items()))
    if (engine_here := strategy.inference_engine) is not None:
        load = engine_here._load_bucket

        def forgetful(bucket: Any) -> None:
            load(replace(bucket, tensors={name: t for name, t in bucket.tensors.items() if name != VICTIM}))

        engine_here._load_bucket = forgetful
    with pytest.raises(WeightSyncError) as error:
        strategy.update_engine_weights(actor)
    strategy.engine_host.shutdown()
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize("engine", SPLIT, ids=cell)
def test_an_engine_that_keeps_old_values_is_found_out(ranks: RankPool, folder: str, engine: Engine) -> None:
    for _, text in ranks.run(held_back, tuple(installed(engine)), folder):
        assert VICTIM in text
        assert "values differ from what was sent" in text


# ---- bfloat16 --------------------------------------------------------------------------------------------------------
def in_bfloat16(engine: Engine, folder: str) -> tuple[float, float]:
    """Largest distance of logprobs from a forward in fp32: the engine's, and of a plain forward in bf16."""
    strategy, _ = started("FSDP2", engine, folder, bf16=True)
    exact = tiny_model("qwen2", seed=1).to(torch.bfloat16).float()  # the weights that the engine has
    rounded = tiny_model("qwen2", seed=1).to(torch.bfloat16)
    mine = plain = 0.0
    for output in generated(strategy):
        rows = zip(processed_logprobs(exact, output, GREEDY), processed_logprobs(rounded, output, GREEDY), strict=True)
        for (right, half), token, logprob in zip(rows, output.output_token_ids, output.logprobs or (), strict=True):
            mine = max(mine, abs(float(right[token]) - logprob))
            plain = max(plain, abs(float(right[token] - half[token])))
    strategy.engine_host.shutdown()
    return mine, plain


@pytest.mark.parametrize("engine", SPLIT, ids=cell)
def test_table_of_bfloat16(ranks: RankPool, folder: str, engine: Engine) -> None:
    """An engine in bf16 is no farther from fp32 than four times what rounding does to a plain forward."""
    mine, plain = (
        max(values) for values in zip(*ranks.run(in_bfloat16, tuple(installed(engine)), folder), strict=True)
    )
    sys.stdout.write(f"| bf16 | {cell(engine)} | {mine:.1e} | plain forward {plain:.1e} |\n")
    assert 0 < mine < 4 * plain
