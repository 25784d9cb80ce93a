"""FSDP2 and ZeRO-3 on two ranks feed vLLM, one engine a rank and one for both; the command trains with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.strategy import get_strategy
from lightrft.testing import RankPool, tiny_model
from lightrft.testing.engine_suite import GREEDY, PROMPTS, greedy_reference, processed_logprobs
from lightrft.testing.tiny_models import save_tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -s vllm_integration brings it")

SETTINGS = {
    "engine_type": "vllm",
    "micro_train_batch_size": 1,
    "train_batch_size": 2,
    "max_model_len": 128,
    "prompt_max_len": 64,
    "verify_weights": "full",
    "engine_extra": {"kv_cache_memory_bytes": 8 * 2**20},
}
BACKENDS = {"fsdp": {"fsdp": True}, "zero 3": {"zero_stage": 3}}


@pytest.fixture(scope="module")
def ranks() -> Any:
    with RankPool(2, timeout=400.0, env={"DS_ACCELERATOR": "cpu"}) as pool:
        yield pool


def fed(backend: str, size: int, folder: str) -> tuple[list[list[int]], float]:
    """Greedy tokens for this rank's prompts (uneven shares), and the largest error of their logprobs."""
    strategy = get_strategy({**SETTINGS, **BACKENDS[backend], "engine_tp_size": size, "pretrain": folder})
    strategy.setup_distributed()
    actor = strategy.prepare_model(tiny_model("qwen2", seed=1))
    # The documents' call: the engine loads --pretrain, the actor's weights follow.
    strategy.setup_inference_engine(strategy.args, engine_type="vllm", actor=actor)
    share = PROMPTS[:4] if strategy.rank == 0 else PROMPTS[4:]
    outputs = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=share)
    again = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=share)  # it slept in between
    assert [o.output_token_ids for o in again] == [o.output_token_ids for o in outputs]
    plain, error = tiny_model("qwen2", seed=1), 0.0
    for output in outputs:
        rows = processed_logprobs(plain, output, GREEDY)
        for row, token, logprob in zip(rows, output.output_token_ids, output.logprobs or (), strict=True):
            error = max(error, abs(float(row[token]) - logprob))
    strategy.engine_host.shutdown()
    return [output.output_token_ids for output in outputs], error


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sharded_actor_feeds_vllm(ranks: RankPool, backend: str, size: int, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "model")
    results = ranks.run(fed, backend, size, folder)
    model = tiny_model("qwen2", seed=1)
    assert [tokens for part, _ in results for tokens in part] == [greedy_reference(model, p, 12) for p in PROMPTS]
    error = max(error for _, error in results)
    sys.stdout.write(f"{backend}, vLLM over {size}: greedy tokens equal, largest logprob difference {error:.1e}\n")
    assert error < 1e-5


def test_the_command_trains_with_vllm(tmp_path: Path) -> None:
    flags = "--engine_type vllm --max_steps 2 --rollout_batch_size 4 --n_samples_per_prompt 2 --train_batch_size 8"
    command = [
        sys.executable,
        "-m",
        "lightrft.cli.main",
        "train",
        *flags.split(),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 2
    assert torch.tensor([row.get("loss", 0.0) for row in rows]).isfinite().all()
