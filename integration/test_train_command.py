"""``lightrft train`` as it is, with one flag more: which backend trains is no matter of the numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightrft.cli.main import main
from lightrft.strategy import StrategyConfig
from lightrft.testing import RankPool
from lightrft.trainer.metrics import read_metrics

STEPS = 3
FLAGS: Mapping[str, tuple[str, ...]] = {
    "fsdp": ("--fsdp",),
    "zero1": ("--zero_stage", "1"),
    "zero3": ("--zero_stage", "3"),
}
INITIAL_MODEL = "initial_model"


@pytest.fixture(scope="module")
def runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The output folders of a few steps of the default run, by backend, as torchrun would start them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in FLAGS.items():
        if name != "fsdp":  # what the first run has built, the others would build alike
            shutil.copytree(folder / "fsdp" / INITIAL_MODEL, folder / name / INITIAL_MODEL)
        words = ["train", *flags, "--max_steps", str(STEPS), "--max_eval_samples", "32"]
        assert ranks.run(main, [*words, "--output_dir", str(folder / name)]) == [0, 0], ranks.output(0)
    return {name: folder / name for name in FLAGS}


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_stage_means_deepspeed_though_the_default_run_chooses_fsdp(runs: Mapping[str, Path], name: str) -> None:
    saved = StrategyConfig.from_yaml(runs[name] / "config.yaml")
    assert (saved.backend, saved.zero_stage, saved.engine_type) == ("deepspeed", int(name[-1]), "hf")
    assert StrategyConfig.from_yaml(runs["fsdp"] / "config.yaml").backend == "fsdp"


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_the_same_seed_gives_the_same_metrics(runs: Mapping[str, Path], name: str) -> None:
    mine, reference = (read_metrics(runs[run] / "metrics.jsonl") for run in (name, "fsdp"))
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    for one, two in zip(mine, reference, strict=True):
        for exact in ("reward_mean", "reward_std", "response_length_mean", "finished_share", "weight_version"):
            assert one[exact] == two[exact], exact
        for rounded in ("loss", "grad_norm", "policy_kl"):
            assert one[rounded] == pytest.approx(two[rounded], rel=1e-5, abs=1e-7), rounded


def test_all_backends_leave_the_same_model(runs: Mapping[str, Path]) -> None:
    start = AutoModelForCausalLM.from_pretrained(runs["fsdp"] / INITIAL_MODEL).state_dict()
    models = {name: AutoModelForCausalLM.from_pretrained(runs[name] / "model").state_dict() for name in FLAGS}
    for name, weight in models["fsdp"].items():
        for backend, other in models.items():
            # Adam moves an element whose gradient is nothing but rounding by a full learning rate, either way.
            torch.testing.assert_close(other[name], weight, atol=2e-5, rtol=0, msg=lambda m, b=backend: f"{b}: {m}")
    assert max((models["fsdp"][name] - start[name]).abs().max() for name in start) > 1e-4, "they trained"
