"""The ``lightrft`` command with ``--engine_type vllm``, as a user starts it: doctor, train, resume.

Without vLLM these are skipped: ``uv run nox -s vllm_integration`` brings it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightrft.cli.main import main
from lightrft.data.tasks import build_model, build_tokenizer
from lightrft.testing import RankPool
from lightrft.trainer.metrics import read_metrics

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -s vllm_integration brings it")

STEPS = 4
# A reward is code that a run loads: this one breaks rank 1's engine in the middle of the third rollout, once a file
# says so.
BREAKER = """
import os
from pathlib import Path

def grade(prompts, responses, labels, **extras):
    return [float(response == label) for response, label in zip(responses, labels)]

if os.environ.get("RANK") == "1" and Path(__file__).with_name("armed").exists():
    from lightrft.engines.vllm import VLLMEngine

    whole, calls = VLLMEngine._run, []

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            self._llm.step = lambda: 1 / 0
        return whole(self, *arguments)

    VLLMEngine._run = broken
"""


def lightrft(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "lightrft.cli.main", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
    )


# ---- doctor ----------------------------------------------------------------------------------------------------------
@pytest.mark.full
def test_doctor_examines_vllm_split_over_two_ranks() -> None:
    done = lightrft("doctor", "--fsdp", "--engine_type", "vllm", "--engine_tp_size", 2, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, "it ends quietly"
    told = json.loads(done.stdout)
    assert told["verdict"] == "fit"
    checks = {check["check"]: check for check in told["checks"]}
    assert checks["weight sync"]["figures"]["verified"] == "full"
    assert checks["drift"]["figures"]["max"] < 1e-5
    assert checks["drift"]["figures"]["changed"] == 0
    assert checks["sleep"]["figures"]["freed_mib"] > 1, "the KV cache is given back on a CPU too"
    assert checks["sleep"]["figures"]["equal"] == 8


# ---- train -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command's words for a small model without a warm start, in ``tmp_path / "run"``."""
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "breaker.py").write_text(BREAKER)
    return f"""
        train --output_dir {tmp_path / "run"} --fsdp --engine_type vllm --pretrain {tmp_path / "model"}
        --prompt_data task:reverse_digits --reward breaker:grade --rollout_batch_size 8 --n_samples_per_prompt 4
        --train_batch_size 32 --micro_train_batch_size 8 --prompt_max_len 8 --generate_max_len 5 --init_kl_coef 0
        --max_steps {STEPS} --save_steps 1 --plot_every -1 --max_model_len 32
    """.split()


@pytest.mark.full
def test_a_run_ends_quietly(words: list[str], tmp_path: Path) -> None:
    done = lightrft(*words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def under_torchrun(folder: Path, words: list[str]) -> int:
    """On a rank that a launcher has started: the command, with the modules that lie in the folder."""
    from lightrft.engines.vllm.backend import _World

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        code = main(words)
    assert code != 0 or _World.engines == 0, "a run that has ended leaves no engine behind"
    return code


@pytest.mark.parametrize(
    ("launched", "size"),
    [(False, 1), pytest.param(True, 1, marks=pytest.mark.full), pytest.param(True, 2, marks=pytest.mark.full)],
)
def test_an_engine_that_breaks_ends_the_run_and_resume_goes_on(
    words: list[str], ranks: RankPool, tmp_path: Path, launched: bool, size: int
) -> None:
    (tmp_path / "armed").touch()
    words += ["--engine_tp_size", str(size)]
    if launched:
        done = lightrft(*words, PYTHONPATH=str(tmp_path))
        assert done.returncode == 1, done.stdout + done.stderr
        shown = done.stderr
        assert "lightrft train --resume --output_dir" in shown
    else:
        assert ranks.run(under_torchrun, tmp_path, words) == [1, 1], ranks.output(0)
        shown = ranks.output(0) + ranks.output(1)
    # From rank 1 itself, or from rank 0 that was told, where the launcher ended rank 1 before it had spoken.
    assert re.search(r'rank 1: (RolloutError: )?engine "vllm" failed while generating: ZeroDivisionError', shown)
    reached = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert reached == [1, 2]

    (tmp_path / "armed").unlink()
    ranks.restart()
    assert ranks.run(under_torchrun, tmp_path, ["train", "--resume", *words[1:3]]) == [0, 0]
    assert "resumed from" in ranks.output(0)
    assert "Traceback" not in ranks.output(0) + ranks.output(1)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # Every sample of a step was written by the weights that the step before left, also across the resume.
    assert [line["weight_version"] for line in lines] == [step + 1 for step in range(1, STEPS + 1)]
    assert [line["sample_versions"] for line in lines] == [{str(step): 32} for step in range(1, STEPS + 1)]
    assert all(line["logprob_drift_max"] < 1e-5 for line in lines)
