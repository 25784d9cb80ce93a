"""A run of ``lightrft train`` killed under ZeRO-3 on two ranks goes on under FSDP2 on one, as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lightrft.data.tasks import build_model, build_tokenizer
from lightrft.trainer.metrics import read_metrics

STEPS, SECONDS = 6, 240.0
SETTINGS = {
    "engine_type": "hf",
    "enable_engine_sleep": False,
    "prompt_data": "task:reverse_digits",
    "eval_data": "task:reverse_digits",
    "max_samples": 64,
    "max_eval_samples": 8,
    "reward": "format_free:even",
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 4,
    "train_batch_size": 8,
    "micro_train_batch_size": 2,
    "max_epochs": 2,
    "generate_max_len": 5,
    "prompt_max_len": 8,
    "actor_learning_rate": 1e-3,
    # Adam divides by a root: a larger epsilon keeps rounding of tiny gradients from looking like an error.
    "adam_eps": 1e-4,
    "init_kl_coef": 0.0,
    "max_steps": STEPS,
    "save_steps": 1,
    "plot_every": -1,
    "use_tensorboard": False,
}
REWARD = """
def even(prompts, responses, labels, **extras):
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in responses]
"""


def start(folder: Path, name: str, *flags: str) -> subprocess.Popen[str]:
    """The command; what it says goes to NAME.log, and its ranks write their process ids to NAME/."""
    scratch = folder / name
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "lightrft.cli.main", "train", *flags]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)


@pytest.mark.full
def test_a_run_killed_under_zero_3_goes_on_under_fsdp2_on_one_rank(tmp_path: Path) -> None:
    build_model(layers=1, width=64).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    (tmp_path / "format_free.py").write_text(REWARD)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "pretrain": str(tmp_path / "start")}))
    whole, run = tmp_path / "whole", tmp_path / "killed"
    zero = ("--config", str(config), "--zero_stage", "3", "--nproc_per_node", "2")
    undisturbed = start(tmp_path, "first", *zero, "--output_dir", str(whole))
    assert undisturbed.wait(SECONDS) == 0, (tmp_path / "first.log").read_text()

    killed = start(tmp_path, "second", *zero, "--output_dir", str(run))
    deadline = time.monotonic() + SECONDS
    while len(read_metrics(run / "metrics.jsonl")) < 2:
        assert killed.poll() is None, (tmp_path / "second.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "second.log").read_text()
        time.sleep(0.005)
    ranks = [int(path.name.removeprefix("pid.")) for path in (tmp_path / "second").glob("lightrft-*/pid.*")]
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    assert killed.wait(SECONDS) == 1
    assert len(read_metrics(run / "metrics.jsonl")) < STEPS, "it was killed on the way"

    flags = ("--resume", "--fsdp", "--nproc_per_node", "1", "--output_dir", str(run))
    resumed = start(tmp_path, "third", *flags)
    assert resumed.wait(SECONDS) == 0, (tmp_path / "third.log").read_text()
    assert "resumed from" in (tmp_path / "third.log").read_text()
    mine, expected = read_metrics(run / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    assert [line["reward_mean"] for line in mine] == [line["reward_mean"] for line in expected], "the same tokens"
    one, other, begun = (
        load_file(path / "model.safetensors") for path in (run / "model", whole / "model", tmp_path / "start")
    )
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert max((other[name] - begun[name]).abs().max() for name in begun) > 1e-3, "it trained"
    # The checkpoint carries the tokenizer, so that what is made of it is whole.
    kept = sorted((run / "checkpoints").glob("step_*/actor/hub"))[-1]
    assert AutoTokenizer.from_pretrained(kept)("12=").input_ids == build_tokenizer()("12=").input_ids
