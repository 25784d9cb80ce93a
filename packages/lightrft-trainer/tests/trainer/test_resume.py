from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.strategy import CheckpointError
from lightrft.trainer.metrics import read_metrics
from lightrft.trainer.prompt_stream import PromptStream
from lightrft.trainer.run_state import RunState

Make = Callable[..., Any]

# Two passes over the buffer, two optimizer steps each: four places in the middle of every step.
REUSED = {"max_epochs": 2, "max_steps": 3, "save_steps": 1}
# Everything that has a state of its own.
EVERYTHING = {
    **REUSED,
    "advantage_estimator": "gae",
    "init_kl_coef": 0.1,
    "kl_target": 0.01,
    "kl_horizon": 50,
    "reward_running_norm": True,
    "enable_ema": True,
    "entropy_coef": 0.01,
    "lr_scheduler": "cosine_with_min_lr",
    "dynamic_sampling": True,
}


class Asked:
    """An interruption that comes at the k-th moment at which the trainer looks."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


class CrashError(Exception):
    """Stands for kill -9: nothing after it runs."""


def everything_of(setup: Any) -> dict[str, torch.Tensor]:
    trainer = setup.trainer
    models = {"actor": trainer.actor, "critic": trainer.critic, "ema": trainer.ema_model}
    return {
        f"{role}.{name}": value.detach().clone()
        for role, model in models.items()
        if model is not None
        for name, value in model.state_dict().items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def comparable(setup: Any) -> list[dict[str, Any]]:
    lines = read_metrics(setup.trainer.output_dir / "metrics.jsonl")
    drop = ("seconds", "tokens_per_second")
    return [{key: value for key, value in line.items() if not key.startswith(drop)} for line in lines]


MOMENTS = [pytest.param(m, marks=() if m in (1, 4, 7) else pytest.mark.full) for m in range(12)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_interrupted_between_two_optimizer_steps_goes_on_as_if_it_had_not(
    make: Make, tmp_path: Path, moment: int
) -> None:
    whole = make(**REUSED, output_dir=str(tmp_path / "whole"))
    whole.fit()
    first = make(**REUSED, output_dir=str(tmp_path / "cut"))
    state = first.fit(interruption=Asked(moment))
    assert first.trainer.interrupted
    # Four optimizer steps a rollout: it is the middle of a buffer but where a rollout has just ended.
    assert (state.step, state.training) == (moment // 4, moment % 4 != 0)
    second = make(**REUSED, output_dir=str(tmp_path / "cut"))
    second.fit(resume=True)
    assert_same(everything_of(whole), everything_of(second))
    assert comparable(whole) == comparable(second)


@pytest.mark.parametrize("moment", [2, 5])
def test_critic_average_controllers_and_norms_come_back(make: Make, tmp_path: Path, moment: int) -> None:
    whole = make(**EVERYTHING, output_dir=str(tmp_path / "whole"))
    whole.fit()
    make(**EVERYTHING, output_dir=str(tmp_path / "cut")).fit(interruption=Asked(moment))
    second = make(**EVERYTHING, output_dir=str(tmp_path / "cut"))
    second.fit(resume=True)
    assert_same(everything_of(whole), everything_of(second))
    assert second.trainer.kl_ctl.value == whole.trainer.kl_ctl.value
    assert vars(second.trainer.experience_maker.moments) == vars(whole.trainer.experience_maker.moments)
    assert comparable(whole) == comparable(second)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_crashes_anywhere_goes_on_from_its_last_checkpoint(make: Make, tmp_path: Path, seed: int) -> None:
    whole = make(**REUSED, output_dir=str(tmp_path / "whole"))
    whole.fit()
    moment = random.Random(seed).randrange(4, 12)
    first = make(**REUSED, output_dir=str(tmp_path / "cut"))
    step, count = first.trainer.training_step, iter(range(100))

    def crashing(*args: Any) -> dict[str, float]:
        if next(count) == moment:
            raise CrashError
        return step(*args)

    first.trainer.training_step = crashing
    with pytest.raises(CrashError):
        first.fit()
    second = make(**REUSED, output_dir=str(tmp_path / "cut"))
    second.fit(resume=True)
    assert_same(everything_of(whole), everything_of(second))
    assert comparable(whole) == comparable(second)


def test_a_damaged_checkpoint_is_passed_over(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make(**REUSED, output_dir=str(tmp_path / "run"))
    whole.fit()
    newest = tmp_path / "run" / "checkpoints" / "step_000003"
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    second = make(**REUSED, output_dir=str(tmp_path / "run"))
    second.fit(resume=True)
    assert "step_000003 is damaged" in capsys.readouterr().out
    assert_same(everything_of(whole), everything_of(second))


def test_checkpoints_that_are_all_damaged_are_an_error_not_a_fresh_start(make: Make, tmp_path: Path) -> None:
    make(output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1).fit()
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/client_state.json"):
        manifest.write_text("{}", encoding="utf-8")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make(output_dir=str(tmp_path / "run"), max_steps=4, resume=True).fit()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = make(max_steps=1)
    assert setup.fit(resume=True).step == 1
    assert "no checkpoint yet; starting from the beginning" in capsys.readouterr().out


def test_evaluations_without_a_reward_are_refused_at_once() -> None:
    with pytest.raises(CheckpointError, match="whose evaluations have no reward"):
        RunState.from_json({**RunState().to_json(), "evaluation": {"0": 0.25}})


def test_a_finished_run_resumes_to_nothing_and_to_more_steps(make: Make, tmp_path: Path) -> None:
    make(max_steps=2).fit()
    again = make(max_steps=2)
    assert again.fit(resume=True).step == 2
    assert make(max_steps=3).fit(resume=True).step == 3


@pytest.mark.parametrize("changed", [False, True])
def test_prompts_that_have_changed_since_the_checkpoint_are_told(
    make: Make, capsys: pytest.CaptureFixture[str], changed: bool
) -> None:
    make(max_steps=1).fit()
    again = make(max_steps=1)
    if changed:
        again.prompts._prompts.reverse()
    again.fit(resume=True)
    assert ("the prompts are not those of the checkpoint" in capsys.readouterr().out) == changed


def test_a_resumed_run_takes_the_settings_that_it_is_given(make: Make) -> None:
    make(init_kl_coef=0.1, max_steps=1, lr_scheduler="linear").fit()
    given = {"actor_learning_rate": 1e-3, "adam_betas": (0.8, 0.9), "l2": 0.1, "init_kl_coef": 0.5}
    trainer = make(**given, lr_scheduler="linear").trainer
    assert trainer.load_state(PromptStream([], episodes=1, batch_size=4))
    group = trainer.actor_optim.param_groups[0]
    assert (group["betas"], group["weight_decay"], trainer.kl_ctl.value) == ((0.8, 0.9), 0.1, 0.5)
    # The schedule goes on where it was: two of the three steps that warm up are done.
    assert group["lr"] == trainer.actor_scheduler.get_last_lr()[0] == pytest.approx(1e-3 * 3 / 4)
    trainer.actor_scheduler.step()
    assert group["lr"] == pytest.approx(1e-3)
