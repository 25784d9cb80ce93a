"""vLLM under a launcher: on two ranks, each with its own engine, and two ranks with one between them."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import RolloutError
from lightrft.strategy.sampling import SamplingParams
from lightrft.testing import RankPool, torchrun
from lightrft.testing.engine_suite import (
    GREEDY,
    PROMPTS,
    greedy_reference,
    hub_state,
    push_weights,
    requests_for,
    tokens_of,
)
from lightrft.testing.ranks import PRELOAD, PRELOAD_VLLM
from lightrft.testing.tiny_models import save_tiny_model, tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -t vllm brings it")

from lightrft.engines.vllm import VLLMEngine

IN_STEP = Path(__file__).parent / "vllm_in_step.py"


@pytest.fixture(scope="module")
def ranks() -> Any:
    with RankPool(2, timeout=300.0, preload=(*PRELOAD, *PRELOAD_VLLM)) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("tiny") / "qwen2")


def shared_memory() -> set[Path]:
    """What vLLM shares between the ranks of an engine, on a machine that shows it as files."""
    return set(Path("/dev/shm").glob("*cpushm*"))


def started(folder: str, size: int, **options: Any) -> VLLMEngine:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    engine = VLLMEngine()
    spec = EngineSpec(
        pretrain=folder,
        max_model_len=128,
        tensor_parallel_size=size,
        extra={"kv_cache_memory_bytes": 8 * 2**20},
        **options,
    )
    engine.start(spec, dist.group.WORLD if size > 1 else None)
    return engine


def life(folder: str, size: int) -> dict[str, Any]:
    """Generate, sync in odd buckets, read back, sleep at both levels, end; what came of each."""
    sampling = SamplingParams(max_tokens=8)
    with warnings.catch_warnings(record=True, action="always", category=FutureWarning) as warned:
        engine = started(folder, size)
        found: dict[str, Any] = {
            "greedy": tokens_of(engine.generate(requests_for(PROMPTS, GREEDY))),
            "sampled": tokens_of(engine.generate(requests_for(PROMPTS, sampling))),
        }
    found["warned"] = [str(warning.message) for warning in warned]
    new = tiny_model("qwen2", seed=1)
    push_weights(engine, new, 1, bucket_bytes=12_345)
    state = hub_state(new)
    mine = engine.local_positions({name: torch.arange(tensor.numel()) for name, tensor in state.items()})
    held = engine.sample_weights(mine)
    found["right"] = all(torch.equal(held[name], state[name].reshape(-1)[mine[name]]) for name in state)
    found["held"] = {name: at.tolist() for name, at in mine.items()}
    found["synced"] = tokens_of(engine.generate(requests_for(PROMPTS, GREEDY)))
    engine.release("kv_cache")
    found["freed"] = engine.release("weights", keep=False)
    engine.restore("weights")
    push_weights(engine, tiny_model("qwen2"), 2)
    engine.restore("kv_cache")
    found["woken"] = tokens_of(engine.generate(requests_for(PROMPTS, GREEDY)))
    engine.shutdown()
    flag = torch.ones(1)
    dist.all_reduce(flag)
    found["world"] = flag.item()
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_a_whole_life_on_two_ranks(ranks: RankPool, folder: str, size: int) -> None:
    before = shared_memory()
    results = ranks.run(life, folder, size)
    assert shared_memory() <= before, "nothing is left that the next start could stumble over"
    old, new = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    expected = [greedy_reference(old, prompt, 12) for prompt in PROMPTS]
    for result in results:
        assert result["greedy"] == result["woken"] == expected
        assert result["synced"] == [greedy_reference(new, prompt, 12) for prompt in PROMPTS]
        assert result["right"]
        assert result["warned"] == []
        assert result["freed"] > 0
        assert result["sampled"] == results[0]["sampled"]
        assert result["world"] == 2, "the trainer's process group outlives the engine"
    for name, tensor in hub_state(new).items():
        together = {position for result in results for position in result["held"][name]}
        assert together == set(range(tensor.numel())), name
    if size == 2:
        assert any(len(results[0]["held"][name]) < tensor.numel() for name, tensor in hub_state(new).items())


def sampled(folder: str, size: int) -> list[list[int]]:
    engine = started(folder, size)
    try:
        return tokens_of(engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=12))))
    finally:
        engine.shutdown()


def test_samples_do_not_depend_on_the_tensor_parallel_size(ranks: RankPool, folder: str) -> None:
    assert ranks.run(sampled, folder, 1) == ranks.run(sampled, folder, 2)


def late(folder: str) -> int:
    engine = started(folder, 2)
    try:
        requests = requests_for(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True))
        deadline = 0.0 if dist.get_rank() == 1 else 600.0  # one rank's clock alone
        with pytest.raises(TimeoutError, match="deadline"):
            engine.generate(requests, timeout=deadline)
        return len(engine.generate(requests_for(PROMPTS, GREEDY)))
    finally:
        engine.shutdown()


def test_ranks_of_one_engine_give_up_together_and_go_on(ranks: RankPool, folder: str) -> None:
    assert ranks.run(late, folder) == [len(PROMPTS)] * 2


def widowed(folder: str) -> str:
    engine = started(folder, 2, call_timeout=20.0)
    dist.barrier()
    if dist.get_rank() == 1:
        signal.raise_signal(signal.SIGKILL)
    try:
        engine.generate(requests_for(PROMPTS, GREEDY), timeout=60.0)
    except RolloutError as error:
        return str(error)
    return "nothing was raised"


def test_a_rank_that_dies_is_an_error_of_the_others_within_the_deadline(ranks: RankPool, folder: str) -> None:
    job = ranks.submit(widowed, folder)
    outcomes = job.outcomes(90.0)
    assert outcomes[1].died == -signal.SIGKILL
    assert "vllm" in outcomes[0].value and "--resume" in outcomes[0].value


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2])
def test_the_engine_suite_holds_on_the_ranks_of_a_launch(size: int, tmp_path: Path) -> None:
    env = {"LIGHTRFT_TEST_FOLDER": str(tmp_path)}
    result = torchrun(IN_STEP, str(size), nproc_per_node=2, env=env, timeout=1500.0)[0]
    assert result.returncode == 0, result.output[-6000:]
