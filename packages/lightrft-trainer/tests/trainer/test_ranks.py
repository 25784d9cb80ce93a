"""Several ranks make of their samples what one makes of all: whatever is counted, averaged or chosen over a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lightrft.data.tasks import build_default_model
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.testing import RankPool
from lightrft.trainer.metrics import read_metrics
from lightrft.trainer.run import build

STEP: Mapping[str, Any] = {
    "engine_type": "hf",
    "enable_engine_sleep": False,
    "reward": "odd_digits:odd",
    "input_key": "input",
    "label_key": "label",
    "rollout_batch_size": 6,
    "n_samples_per_prompt": 3,
    "train_batch_size": 10,  # two optimizer steps
    "micro_train_batch_size": 1,
    "micro_rollout_batch_size": 4,
    "prompt_max_len": 24,
    "generate_max_len": 8,
    "actor_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "max_norm": 0.5,
    "max_steps": 1,
    "save_steps": -1,
    "plot_every": -1,
    "use_tensorboard": False,
    # What needs figures of all ranks:
    "reward_running_norm": True,
    "reward_running_norm_minus_mean": True,
    "reward_clip": 1.0,
    "advantages_norm": True,
    "init_kl_coef": 0.1,
    "entropy_coef": 0.01,
    "importance_sampling_cap": 1.0,
}
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "groups": {
        "advantage_estimator": "reinforce_baseline",
        "dynamic_sampling": True,
        "high_entropy_token_ratio": 0.5,
        "loss_agg_mode": "seq-mean-token-mean",
        "packing_samples": True,
    },
    "critic, shared sequences": {"advantage_estimator": "gae", "sp_size": 2},
}
# Dynamic sampling drops the groups of prompts that always earn nothing, or always everything: not equally many on each
# rank.
REWARD = """
from lightrft.rewards import RewardOutput

def odd(prompts, responses, labels, **extras):
    share = [sum(c in '13579' for c in response) / max(1, len(response)) for response in responses]
    earned = [0.0 if label in "0369" else 1.0 if label == "1" else part for label, part in zip(labels, share)]
    return RewardOutput(earned, {"share": share})
"""


def one_step(settings: Mapping[str, Any], folder: Path, output_dir: Path) -> tuple[list[dict[str, Any]], Any]:
    """On every rank: the figures of a step, and what is held out."""
    config = StrategyConfig(
        **{**STEP, **settings},
        pretrain=str(folder / "model"),
        prompt_data=str(folder / "prompts.jsonl"),
        eval_data=str(folder / "held_out.jsonl"),
        output_dir=str(output_dir),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        trainer, loader, held_out = build(get_strategy(config), config, output_dir)
        patch.setattr(trainer, "_plot", lambda: None)
        state = trainer.fit(config, loader, eval_prompts=held_out)
    return read_metrics(output_dir / "metrics.jsonl"), state.evaluation


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_ranks_make_of_a_step_what_one_makes_of_it(ranks: RankPool, tmp_path: Path, algorithm: str) -> None:
    build_default_model(tmp_path / "model")
    (tmp_path / "odd_digits.py").write_text(REWARD)
    for name, count in (("prompts", 24), ("held_out", 5)):
        questions = [{"input": f"{i * i}=", "label": str(i)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    settings = ALGORITHMS[algorithm]
    (alone,), evaluation = one_step({**settings, "strategy": "fake", "sp_size": 1}, tmp_path, tmp_path / "one")
    (shared,), evaluations = ranks.run(one_step, {**settings, "fsdp": True}, tmp_path, tmp_path / "two")[0]
    assert shared.pop("sample_versions") == alone.pop("sample_versions")
    measured = [key for key in alone if not key.startswith(("seconds", "tokens_per_second"))]
    expected = pytest.approx([alone[key] for key in measured], rel=1e-4, abs=1e-5)  # drift is rounding alone
    assert [shared[key] for key in measured] == expected, measured
    assert 0 < alone["finished_share"] < 1, "responses differ in length"
    assert bool(alone["groups_dropped"]) == settings.get("dynamic_sampling", False)
    assert {figures["accuracy"] for figures in evaluation.values()} == {0.2}
    assert evaluations == {step: pytest.approx(figures) for step, figures in evaluation.items()}
