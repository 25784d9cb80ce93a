from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from lightrft.rewards import RewardError, RewardOutput
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.hub_layout import unwrap
from lightrft.strategy.lifecycle import EngineStatus
from lightrft.trainer import DriftError, SPMDPPOTrainer, experience_maker, minibatches, replay_buffer
from lightrft.trainer import policy_update as update_module
from lightrft.trainer.experience_maker import sums_and_counts
from lightrft.trainer.losses import PolicyLoss
from lightrft.trainer.metrics import STEP_KEYS, read_metrics
from lightrft.trainer.prompt_stream import PromptStream

Make = Callable[..., Any]
GUIDE = Path(__file__).parents[4] / "docs/usage.md"


def lines(setup: Any) -> list[dict[str, Any]]:
    return read_metrics(setup.trainer.output_dir / "metrics.jsonl")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_learns_and_writes_a_line_a_step_with_every_key(make: Make) -> None:
    setup = make(max_steps=12, rollout_batch_size=8, train_batch_size=32, actor_learning_rate=3e-3)
    state = setup.fit()
    assert state.step == 12
    written = lines(setup)
    assert [line["step"] for line in written] == list(range(1, 13))
    numbers = [key for key in STEP_KEYS if key != "sample_versions"]
    assert all(isinstance(line[key], (int, float)) for line in written for key in numbers)
    assert [line["weight_version"] for line in written] == [written[0]["weight_version"] + i for i in range(12)]
    # Each step's samples were written by the weights that the step before had left.
    assert [line["sample_versions"] for line in written] == [{str(line["weight_version"] - 1): 32} for line in written]
    # One optimizer step a rollout looks at the samples with the weights that the engine was left with.
    assert max(line["logprob_drift_max"] for line in written) < 1e-4
    rewards = [line["reward_mean"] for line in written]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_seconds_are_seconds_and_fit_into_the_step(make: Make) -> None:
    setup = make()
    setup.fit()
    for line in lines(setup):
        parts = [line[key] for key in ("seconds_generate", "seconds_reward", "seconds_experience", "seconds_train")]
        assert all(0 < part < 60 for part in parts)
        assert sum(parts) + line["seconds_sync"] <= line["seconds_total"] + 0.01
        assert line["tokens_per_second"] == pytest.approx(
            line["response_length_mean"] * 16 / line["seconds_generate"], rel=1e-6
        )


def test_the_documents_override_of_ppo_train_works_and_syncs_once(make: Make) -> None:
    class Offloading(SPMDPPOTrainer):
        def ppo_train(self, global_steps: int = 0) -> dict[str, float]:
            self.strategy.maybe_load_optimizer(self.actor_optim)
            train_ret = super().ppo_train(global_steps)
            self.strategy.maybe_offload_optimizer(self.actor_optim)
            self.strategy.print("PPO Train TIMECOST")
            self.strategy.update_engine_weights(self.actor)
            return train_ret

    setup, plain = make(Offloading), make()
    setup.fit()
    versions = [line["weight_version"] for line in lines(setup)]
    assert versions == [versions[0], versions[0] + 1, versions[0] + 2]
    assert all(line["seconds_sync"] > 0 for line in lines(setup))  # though the trainer itself has not synced
    plain.fit()
    assert same(setup.weights(), plain.weights())


def test_the_usage_guides_own_algorithm_gives_its_advantages_and_its_loss(make: Make) -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("## An algorithm of your own")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    names: dict[str, Any] = {"__name__": "mine"}
    exec(example[1], names)

    def train(trainer_class: type[SPMDPPOTrainer]) -> tuple[list[Any], float]:
        setup, samples = make(trainer_class, max_steps=1, train_batch_size=16), []
        trainer = setup.trainer
        step = trainer.training_step

        def noting(*arguments: Any) -> dict[str, float]:
            samples.extend(trainer.replay_buffer.samples.values())
            return step(*arguments)

        trainer.training_step = noting
        setup.fit()
        return samples, lines(setup)[0]["loss"]

    plain, (mine, loss) = train(SPMDPPOTrainer)[0], train(names["MyTrainer"])
    assert any(sample.advantages.any() for sample in mine)
    for one, other in zip(plain, mine, strict=True):
        assert torch.equal(other.advantages, one.advantages / one.response_length)
    total = sum(float((sample.engine_logprobs * sample.advantages).sum()) for sample in mine)
    assert loss == pytest.approx(-total / sum(sample.response_length for sample in mine), abs=1e-5)


def test_names_that_the_documents_read_are_there(make: Make) -> None:
    trainer = make().trainer
    ids = trainer.tokenize_fn(["12=", "3456="], trainer.prompt_max_len, padding=False)["input_ids"]
    assert [len(row) for row in ids] == [3, 5]
    padded = trainer.tokenize_fn(["12=", "3456="], 4)
    assert padded["input_ids"].shape == (2, 4)
    assert trainer.vllm_mp_group is None
    assert trainer.experience_maker.tokenize_fn("1=", 8, padding=False)["input_ids"] == [
        trainer.tokenizer("1=")["input_ids"]
    ]
    for name in ("strategy", "actor", "actor_optim", "critic", "initial_model", "ema_model", "replay_buffer", "args"):
        assert hasattr(trainer, name)


@pytest.mark.parametrize("generate", [{}, {"temperature": 0.5}], ids=["settings", "trainer's own temperature"])
def test_a_learning_rate_of_zero_leaves_no_drift(make: Make, generate: dict[str, float]) -> None:
    setup = make(actor_learning_rate=0.0, max_epochs=2, generate=generate)
    before = setup.weights()
    setup.fit()
    assert same(before, setup.weights())
    for line in lines(setup):
        assert line["logprob_drift_max"] < 1e-5
        assert abs(line["policy_kl"]) < 1e-10


@pytest.mark.parametrize("truncation", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
def test_drift_is_not_measured_between_different_distributions(make: Make, truncation: dict[str, Any]) -> None:
    setup = make(**truncation, max_steps=1)
    setup.fit()
    assert all(line["logprob_drift"] is None for line in lines(setup))


def test_logprobs_are_those_at_the_temperature_that_the_trainer_was_given(make: Make) -> None:
    """Given to the constructor, it wins over the configuration's: in the sampling, and in what is trained."""
    setup = make(partial(SPMDPPOTrainer, temperature=0.5), max_steps=1, actor_learning_rate=0.0, max_epochs=2)
    setup.fit()
    (line,) = lines(setup)
    assert line["logprob_drift_max"] < 1e-5
    assert abs(line["policy_kl"]) < 1e-10


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"temperature": 0.0}, {}, "choose one above 0"),
        ({"top_p": 0.9}, {"importance_sampling_cap": 2.0}, "--importance_sampling_cap: compares full distributions"),
        ({"top_k": 9}, {"max_logprob_drift": 1.0}, "--max_logprob_drift: compares full distributions"),
    ],
)
def test_sampling_that_nothing_can_be_learned_or_compared_from_is_refused(
    make: Make, options: dict[str, float], settings: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(partial(SPMDPPOTrainer, **options), **settings)


def test_too_much_drift_stops_the_run(make: Make) -> None:
    setup = make(max_logprob_drift=1e-12)
    with pytest.raises(DriftError, match="step 1: engine and trainer logprobs differ"):
        setup.fit()


def test_a_step_s_figures_are_means_over_its_optimizer_steps(make: Make) -> None:
    setup, steps = make(max_steps=1, max_epochs=2, advantage_estimator="gae"), []
    step = setup.trainer.training_step
    setup.trainer.training_step = lambda *arguments: steps.append(step(*arguments)) or steps[-1]
    setup.fit()
    (line,) = lines(setup)
    assert len(steps) == 4
    for name in steps[0]:
        values = [figures[name] for figures in steps]
        expected = max(values) if name.endswith("_max") else sum(values) / (1 if name == "skipped" else 4)
        assert line[name] == pytest.approx(expected), name


def test_a_loss_that_is_not_a_number_moves_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The existing trainer announces that it skips a NaN loss, and then backpropagates it."""
    plain = update_module.policy_loss

    def broken(*args: Any, **options: Any) -> PolicyLoss:
        loss = plain(*args, **options)
        return PolicyLoss(loss.token_losses * math.nan, loss.clipped)

    monkeypatch.setattr(update_module, "policy_loss", broken)
    setup = make(max_steps=1)
    before = setup.weights()
    state = setup.fit()
    assert same(before, setup.weights())
    assert state.skipped_steps == state.optimizer_steps == 2
    (line,) = lines(setup)
    assert (line["skipped"], line["loss"], line["grad_norm"]) == (2, None, None)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_micro_batch_size_does_not_matter(make: Make, mode: str) -> None:
    weights = []
    for size in (4, 1, 2, 8):
        setup = make(loss_agg_mode=mode, micro_train_batch_size=size, max_steps=1, actor_learning_rate=1e-3)
        setup.fit()
        weights.append(setup.weights())
    # Adam amplifies rounding where a gradient is nearly zero; a different weighting of tokens would show at 1e-3.
    for other in weights[1:]:
        assert max((weights[0][name] - other[name]).abs().max() for name in other) < 5e-5


VARIANTS: dict[str, dict[str, Any]] = {
    "gspo": {"use_gspo": True, "loss_agg_mode": "seq-mean-token-mean", "max_epochs": 2},
    "cpgd": {"use_cpg_loss": True, "policy_drift_coef": 0.1, "max_epochs": 2},
    "gae": {"advantage_estimator": "gae", "gamma": 0.9},
    "kl in the reward": {"init_kl_coef": 0.1, "kl_estimator": "k1"},
    "kl in the loss": {"init_kl_coef": 0.1, "use_kl_loss": True, "kl_target": 0.01},
    "entropy": {"entropy_coef": 0.01},
    "high-entropy tokens": {"high_entropy_token_ratio": 0.3},
    "whitened": {"advantages_norm": True, "advantage_clip": 1.0, "advantage_estimator": "reinforce"},
    "baseline": {"advantage_estimator": "reinforce_baseline"},
    "rloo": {"advantage_estimator": "rloo", "eps_clip_high": 0.28},
    "dr_grpo": {"advantage_estimator": "dr_grpo", "loss_agg_mode": "seq-mean-token-sum"},
    "corrected": {"importance_sampling_cap": 2.0},
    "shaped": {"reward_running_norm": True, "reward_running_norm_minus_mean": True, "reward_clip": 2.0},
    "overlong": {"overlong_buffer": True, "overlong_buffer_len": 2},
    "averaged": {"enable_ema": True},
    "dynamic": {"dynamic_sampling": True},
    "sleeping": {"enable_engine_sleep": True, "engine_sleep_level": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_algorithm_trains(make: Make, name: str) -> None:
    setup = make(**VARIANTS[name], max_steps=2)
    before = setup.weights()
    setup.fit()
    assert not same(before, setup.weights())
    assert all(torch.isfinite(value).all() for value in setup.weights().values())
    for line in lines(setup):
        assert line["loss"] is not None
        assert line["skipped"] == 0


def test_tokens_of_low_entropy_count_in_the_mean(make: Make) -> None:
    setup = make(high_entropy_token_ratio=0.3, max_steps=1, train_batch_size=16)
    backward, scales = setup.strategy.backward, []
    setup.strategy.backward = lambda *args, **options: (scales.append(options["scale"]), backward(*args, **options))
    setup.fit()
    (line,) = lines(setup)
    assert set(scales) == {1 / round(16 * line["response_length_mean"])}


# Each flag with a value far from its default, and what it works with.
STRENGTHS: dict[str, tuple[float, dict[str, Any]]] = {
    "use_gspo": (True, {"max_epochs": 2}),
    "use_cpg_loss": (True, {"max_epochs": 2}),
    "value_clip": (1e-4, {"advantage_estimator": "gae", "max_epochs": 2}),
    "policy_drift_clip_eps": (1e-4, {"use_cpg_loss": True, "policy_drift_coef": 1.0, "max_epochs": 2}),
    "overlong_buffer_penalty_factor": (9.0, {"overlong_buffer": True, "overlong_buffer_len": 3}),
}


@pytest.mark.parametrize("flag", STRENGTHS)
def test_a_flag_of_the_algorithm_changes_what_is_learned(make: Make, flag: str) -> None:
    value, others = STRENGTHS[flag]
    learned = []
    for settings in (others, others, {**others, flag: value}):
        setup = make(**settings, max_steps=1)
        setup.fit()
        trained = setup.trainer.critic if flag == "value_clip" else setup.trainer.actor
        learned.append({name: tensor.clone() for name, tensor in trained.state_dict().items()})
    assert same(learned[0], learned[1])
    assert not same(learned[0], learned[2])


def test_kl_to_the_reference_grows_from_zero_and_steers_its_weight(make: Make) -> None:
    setup = make(init_kl_coef=0.1, use_kl_loss=True, kl_target=1e-6, kl_horizon=100, max_steps=3)
    setup.fit()
    written = lines(setup)
    assert written[0]["kl"] < written[-1]["kl"]
    # 16 samples a step, each above the target by more than the fifth that counts.
    assert written[-1]["kl_coef"] / written[-2]["kl_coef"] == pytest.approx(math.exp(0.2 * 16 / 100))


def test_the_average_follows_the_actor_slowly(make: Make) -> None:
    setup = make(enable_ema=True, ema_beta=0.5, max_steps=1, train_batch_size=16)
    before = setup.weights()
    setup.fit()
    average = setup.trainer.ema_model.state_dict()
    after = setup.weights()
    for name, value in average.items():
        assert torch.allclose(value, (before[name] + after[name]) / 2, atol=1e-6)


def test_a_frozen_actor_waits_while_the_critic_learns(make: Make) -> None:
    setup = make(advantage_estimator="gae", freezing_actor_steps=2, max_steps=2)
    before = setup.weights()
    critic = {name: value.clone() for name, value in setup.trainer.critic.state_dict().items()}
    state = setup.fit()
    assert same(before, setup.weights())
    assert not same(critic, setup.trainer.critic.state_dict())
    moved = [scheduler.last_epoch for scheduler in (setup.trainer.actor_scheduler, setup.trainer.critic_scheduler)]
    assert moved == [0, state.optimizer_steps]


def test_a_prompt_that_comes_again_is_answered_with_other_noise(make: Make) -> None:
    maker, prompts = (setup := make()).trainer.experience_maker, [setup.prompts[0]]
    first, again, later = (
        [output.output_token_ids for output in maker.generate(prompts, maker.sampling, step)] for step in (0, 0, 1)
    )
    assert first == again != later


def test_dynamic_sampling_that_finds_nothing_trains_nothing(make: Make) -> None:
    """The existing trainer computes 0/0 there: NaN weights."""
    setup = make(
        dynamic_sampling=True, dynamic_sampling_max_rounds=2, max_steps=1, reward_fn=lambda p, r, labels: [1.0] * len(r)
    )
    before = setup.weights()
    setup.fit()
    assert same(before, setup.weights())
    (line,) = lines(setup)
    assert line["groups_dropped"] == 8
    assert line["reward_mean"] is None


def test_dynamic_sampling_keeps_drawing_until_the_batch_is_full(make: Make) -> None:
    seen: list[int] = []

    def first_draw_is_useless(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
        seen.append(len(responses))
        return [0.0] * len(responses) if len(seen) == 1 else [float(i % 2) for i in range(len(responses))]

    setup = make(dynamic_sampling=True, max_steps=1, reward_fn=first_draw_is_useless)
    setup.fit()
    assert seen == [16, 16]
    (line,) = lines(setup)
    assert (line["groups_dropped"], line["reward_mean"]) == (4, 0.5)


def test_dynamic_sampling_trains_on_the_first_prompts_that_it_can_use(make: Make) -> None:
    draws: list[list[str]] = []

    def half_of_the_first_draw(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
        draws.append(prompts[::4])
        return [float(i % 2 and (i < 8 or len(draws) > 1)) for i in range(len(responses))]

    setup = make(dynamic_sampling=True, reward_fn=half_of_the_first_draw)
    assert setup.trainer._roll_out(PromptStream(setup.loader, episodes=1, batch_size=4))
    held = [setup.prompts[sample.prompt_index].prompt for sample in setup.trainer.replay_buffer.items]
    assert held[::4] == [*draws[0][:2], *draws[1][:2]] and len(held) == 16


def test_a_prompt_that_comes_again_in_a_step_is_answered_anew(make: Make) -> None:
    """Where an episode ends in the middle of the draws, the next one may bring prompts that were turned away before."""
    answers: dict[str, list[list[str]]] = {}

    def watching(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
        for i in range(0, len(prompts), 4):
            answers.setdefault(prompts[i], []).append(responses[i : i + 4])
        return [0.0] * len(responses)

    setup = make(dynamic_sampling=True, max_steps=1, rollout_batch_size=24, train_batch_size=96, reward_fn=watching)
    setup.fit()
    assert all(len(drawn) == 4 for drawn in answers.values())
    assert all(first != second for drawn in answers.values() for first, second in pairwise(drawn))


def test_a_loader_that_gives_more_than_a_rollout_is_refused(make: Make) -> None:
    """Old logprobs would be missing for the second optimizer step, and a resumed run would lose its place."""
    setup = make(train_batch_size=16)
    setup.loader = setup.strategy.setup_dataloader(setup.prompts, 8, collate_fn=setup.prompts.collate_fn)
    with pytest.raises(ValueError, match=r"gave 8 prompts for a step, over all ranks; --rollout_batch_size is 4"):
        setup.fit()


def test_a_reward_s_parts_are_means_over_all_that_was_graded(make: Make) -> None:
    draws: list[int] = []

    def parts(prompts: list[str], responses: list[str], labels: list[Any]) -> RewardOutput:
        draws.append(len(responses))
        rewards = [float(i % 2 and len(draws) > 1) for i in range(len(responses))]
        return RewardOutput(rewards, {"length": [3.0] * len(responses), f"draw_{len(draws)}": [5.0] * len(responses)})

    setup = make(dynamic_sampling=True, max_steps=1, reward_fn=parts)
    setup.fit()
    (line,) = lines(setup)
    assert (line["groups_dropped"], line["reward/length"]) == (4, 3.0)
    assert (line["reward/draw_1"], line["reward/draw_2"]) == (5.0, 5.0)  # over those that have it


def test_parts_of_rewards_are_added_up_by_name_where_ranks_have_others() -> None:
    ranks = [{"right": (3.0, 4), "math": (4.0, 4)}, {"code": (2.0, 4), "right": (1.0, 4)}, {}]
    assert sums_and_counts(ranks) == {"right": (4.0, 8), "math": (4.0, 4), "code": (2.0, 4)}


def test_rewards_are_those_that_the_settings_name(make: Make) -> None:
    settings = {"reward": "format=0.5", "remote_rm_url": "http://localhost:1", "reward_timeout": 3.0}
    (reward,) = make(reward_fn=None, **settings).trainer.grader.rewards
    assert [(part.name, weight, part.timeout) for part, weight in reward.parts] == [
        ("format", 0.5, 3.0),
        ("remote", 1.0, 8.0),  # its own deadline comes first
    ]


def test_a_reward_that_raises_ends_the_run_and_names_the_sample(make: Make) -> None:
    def moody(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
        raise KeyError("mood")

    with pytest.raises(RewardError, match=r"moody raised KeyError: 'mood' for sample 0 of 16"):
        make(reward_fn=moody).fit()


def test_an_engine_that_drops_its_weights_serves_every_draw_and_evaluation(make: Make) -> None:
    setup = make(
        enable_engine_sleep=True,
        engine_sleep_level=2,
        dynamic_sampling=True,
        eval_steps=1,
        reward_fn=lambda p, r, x: [0.0] * len(r),
    )
    state = setup.fit(eval_prompts=[setup.prompts[0]])
    assert list(state.evaluation) == ["0", "1", "2", "3"]
    asleep_while_training: list[bool] = []
    setup = make(enable_engine_sleep=True, engine_sleep_level=1)
    step = setup.trainer.training_step

    def watching(*args: Any) -> dict[str, float]:
        asleep_while_training.append(setup.strategy.inference_engine_status is EngineStatus.SLEEPED)
        return step(*args)

    setup.trainer.training_step = watching
    setup.fit()
    assert all(asleep_while_training)


def test_evaluation_is_greedy_and_comes_before_and_after(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    setup = make(eval_steps=2, max_steps=3, plots=True, temperature=2.0)
    held_out = [setup.prompts[i] for i in range(10)]
    state = setup.fit(eval_prompts=held_out)
    assert list(state.evaluation) == ["0", "2", "3"]
    model, tokenizer = setup.trainer.actor.model, setup.trainer.tokenizer
    for answer in setup.trainer.evaluate(held_out).answers:
        ids = tokenizer(answer["prompt"], return_tensors="pt")["input_ids"]
        greedy = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert answer["response"] == tokenizer.decode(greedy, skip_special_tokens=True)
    saved = json.loads((setup.trainer.output_dir / "evaluation.json").read_text())
    assert saved == state.evaluation
    line = lines(setup)[1]
    assert state.evaluation["2"] == {"accuracy": line["eval_accuracy"], "reward": line["eval_reward"]}
    shown = f"step 2/3  held out: accuracy {line['eval_accuracy']:.3f}  reward {line['eval_reward']:.3f}\n"
    assert shown in capsys.readouterr().out
    assert (setup.trainer.output_dir / "plots" / "accuracy.png").exists()
    with mock.patch("lightrft.trainer.spmd_ppo_trainer.plot_curves") as plot:
        setup.trainer._plot()
    drawn = {line["step"]: line["eval_reward"] for line in plot.call_args.args[0] if "eval_reward" in line}
    assert drawn == {int(step): figures["reward"] for step, figures in saved.items()}


def test_an_evaluation_counts_the_answers_of_all_ranks(make: Make) -> None:
    setup = make()
    alone = setup.trainer.evaluate([setup.prompts[i] for i in range(3)])
    with mock.patch.object(setup.strategy, "reduce_over_data", lambda data, op: {k: 4 * v for k, v in data.items()}):
        of_four = setup.trainer.evaluate([setup.prompts[i] for i in range(3)])
    assert (of_four.count, of_four.reward) == (12, pytest.approx(alone.reward))


def test_a_rank_without_held_out_prompts_evaluates_none(make: Make) -> None:
    assert make().trainer.evaluate([]).count == 0


def test_every_evaluation_reaches_the_trackers(make: Make) -> None:
    class Tracker:
        seen: ClassVar[dict[int, list[float]]] = {}

        def log(self, step: int, values: Mapping[str, Any]) -> None:
            if "eval_accuracy" in values:
                self.seen.setdefault(step, []).append(values["eval_accuracy"])
                assert isinstance(values["eval_reward"], float)

        def close(self) -> None: ...

    setup = make(eval_steps=2, max_steps=3)
    opened = setup.trainer._open_sinks
    setup.trainer._open_sinks = lambda: [*opened(), Tracker()]
    state = setup.fit(eval_prompts=[setup.prompts[0]])
    assert Tracker.seen == {int(step): [found["accuracy"]] for step, found in state.evaluation.items()}
    assert [line["step"] for line in lines(setup)] == [1, 2, 3]


def test_trajectories_show_prompt_response_and_reward(make: Make) -> None:
    setup = make(save_trajectories=True, num_trajectories_to_save=3, max_steps=1)
    setup.fit()
    text = (setup.trainer.log_dir / "trajectories" / "step_1.jsonl").read_text()
    shown = [json.loads(line) for line in text.splitlines()]
    assert len(shown) == 3
    assert shown[0].keys() >= {"prompt", "response", "label", "reward"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 5}, "use max_new_tokens"),
        ({"do_sample": True}, "is not supported here"),
        ({"tempreature": 1.0}, "unknown tempreature"),
        ({"temperature": 0.0}, "temperature=0: greedy answers come from no distribution"),
    ],
)
def test_generation_settings_that_mean_nothing_are_refused(make: Make, options: dict[str, Any], said: str) -> None:
    t = make().trainer
    with pytest.raises(ValueError, match=said):
        SPMDPPOTrainer(
            t.strategy,
            t.actor,
            None,
            None,
            None,
            None,
            t.actor_optim,
            None,
            None,
            None,
            tokenizer=t.tokenizer,
            **options,
        )


def test_what_is_missing_is_named(make: Make) -> None:
    t = make().trainer
    with pytest.raises(ValueError, match="no initial_model") as caught:
        SPMDPPOTrainer(
            t.strategy, t.actor, t.actor, None, None, None, t.actor_optim, None, None, None, init_kl_coef=0.1
        )
    assert "without critic_optim" in str(caught.value)
    assert "no tokenizer" in str(caught.value)


def test_the_constructors_values_win_over_the_configuration(make: Make) -> None:
    t = make().trainer
    other = SPMDPPOTrainer(
        t.strategy,
        t.actor,
        None,
        None,
        None,
        None,
        t.actor_optim,
        None,
        None,
        None,
        tokenizer=t.tokenizer,
        reward_fn=t.grader.rewards[0],
        eps_clip=0.3,
        max_epochs=4,
        temperature=0.7,
        max_new_tokens=3,
    )
    assert (other.eps_clip, other.max_epochs) == (0.3, 4)
    assert (other.sampling.temperature, other.sampling.max_tokens) == (0.7, 3)


def test_a_run_lasts_as_many_episodes_as_asked_for(make: Make) -> None:
    assert make(max_steps=None, num_episodes=2, rollout_batch_size=12, train_batch_size=48).fit().step == 4


def test_consumed_samples_skip_what_earlier_runs_have_used(make: Make) -> None:
    seen: list[str] = []

    def watching(prompts: list[str], responses: list[str], labels: list[Any]) -> list[float]:
        seen.extend(prompts[::4])
        return [float(i % 2) for i in range(len(responses))]

    make(max_steps=3, reward_fn=watching).fit()
    whole, seen = list(seen), []
    seen.clear()
    setup = make(max_steps=1, reward_fn=lambda p, r, labels: (seen.extend(p[::4]), [0.0] * len(r))[1])
    setup.fit(consumed_samples=8)
    assert seen == whole[8:12]


def test_a_supervised_mixture_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="pretrain_dataloader"):
        make().fit(pretrain_dataloader=[1])


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("limit", "kept"),
    [({"max_ckpt_num": 2}, ["step_000003", "step_000004"]), ({"max_ckpt_mem": 1e-9}, ["step_000004"])],
)
def test_checkpoints_are_pruned_and_the_last_is_always_there(
    make: Make, tmp_path: Path, limit: dict[str, Any], kept: list[str]
) -> None:
    make(save_steps=1, max_steps=4, **limit).fit()
    assert checkpoints(tmp_path) == kept


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_are_written_in_the_background_where_asked(make: Make, tmp_path: Path, background: bool) -> None:
    setup = make(save_steps=1, max_steps=2, async_save=background)
    with mock.patch.object(setup.strategy, "save_ckpt", wraps=setup.strategy.save_ckpt) as save:
        setup.fit()
    assert {call.kwargs["asynchronous"] for call in save.call_args_list} == {background}
    assert checkpoints(tmp_path) == ["step_000001", "step_000002"]


def test_a_fused_logprob_that_the_actor_does_not_compute_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"--fused_linear_logprob: pass fused_linear_logprob=True to Actor"):
        make(fused_linear_logprob=True, model_options={})


@pytest.mark.parametrize("length", [4, 5])
def test_an_overlong_buffer_that_leaves_no_token_free_is_refused(make: Make, length: int) -> None:
    with pytest.raises(ValueError, match=rf"--overlong_buffer_len {length}: must be below the 4 tokens"):
        make(overlong_buffer=True, overlong_buffer_len=length)


def with_policies(make: Make, actor: dict[str, Any], reference: dict[str, Any], **settings: Any) -> SPMDPPOTrainer:
    """A trainer whose actor and reference have attributes of their own, as a script of one's own may have made them."""
    t = make(init_kl_coef=0.1, fused_linear_logprob=True, **settings).trainer
    for model, attributes in ((t.actor, actor), (t.initial_model, reference)):
        for name, value in attributes.items():
            setattr(unwrap(model), name, value)
    models = (t.actor, None, None, t.initial_model, None)
    options = {"tokenizer": t.tokenizer, "reward_fn": t.grader.rewards[0]}
    return SPMDPPOTrainer(t.strategy, *models, t.actor_optim, None, None, None, **options)


def test_a_reference_that_is_not_fused_is_refused_by_name(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"^--fused_.*: pass fused_linear_logprob=True to Actor\(...\) of initial_model"
    ):
        with_policies(make, {}, {"fused_linear_logprob": False})


@pytest.mark.parametrize(("chunks", "whose"), [((4096, 64), ""), ((64, 4096), " of initial_model")])
def test_a_chunk_size_that_a_model_was_not_made_with_is_refused(
    make: Make, chunks: tuple[int, int], whose: str
) -> None:
    message = rf"^--chunk_size 64: the model was made with 4096; pass chunk_size=64 to Actor\(...\){whose} as well$"
    with pytest.raises(ValueError, match=message):
        with_policies(make, {"chunk_size": chunks[0]}, {"chunk_size": chunks[1]}, chunk_size=64)


def test_a_scripts_own_chunk_size_stands_where_none_was_asked_for(make: Make) -> None:
    assert with_policies(make, {"chunk_size": 5}, {"chunk_size": 6})


def test_packing_that_the_models_do_not_do_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"--packing_samples: pass packing_samples=True to Actor.*Critic"):
        make(packing_samples=True, advantage_estimator="gae", model_options={})


LONG: dict[str, dict[str, Any]] = {
    "fused": {"fused_linear_logprob": True, "chunk_size": 5},
    "packed": {"packing_samples": True},
    # Of samples of 7 tokens and more, fewer than the 4 that --micro_train_batch_size would take.
    "by tokens": {"max_tokens_per_micro_batch": 27},
    "packed by tokens": {"packing_samples": True, "max_tokens_per_micro_batch": 27},
    "prompts once": {},
}


@pytest.mark.parametrize("flags", LONG.values(), ids=LONG)
def test_how_samples_are_laid_out_does_not_change_the_step(
    make: Make, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[tuple[Any, ...]] = []

    def recorded(*args: Any, cut: Any = minibatches.cut_microbatches, **options: Any) -> Any:
        cuts.append(tuple(options[name] for name in ("size", "max_tokens", "packed", "n_samples")))
        return cut(*args, **options)

    for module in (experience_maker, replay_buffer):
        monkeypatch.setattr(module, "cut_microbatches", recorded)
    options = {"max_steps": 1, "actor_learning_rate": 1e-3, "advantage_estimator": "gae", "critic_learning_rate": 1e-3}
    options |= {"micro_rollout_batch_size": 5, "micro_train_batch_size": 4}
    seen: dict[str, list[tuple[int, ...]]] = {}
    weights = []
    for name, more in (("plain", {}), ("other", flags)):
        setup = make(**options, **more)
        if name == "plain" or flags:
            setup.trainer.actor.shares_prompts = setup.trainer.critic.shares_prompts = False
        seen[name] = []
        embed = setup.trainer.actor.model.get_input_embeddings()
        embed.register_forward_hook(lambda module, args, output, to=seen[name]: to.append(tuple(args[0].shape)))
        cuts.clear()
        setup.fit()
        weights.append(setup.weights())
    limit = flags.get("max_tokens_per_micro_batch")
    # The rollout's forward passes, and those of two optimizer steps.
    assert cuts == [(size, limit, "packing_samples" in flags, 1 if flags else 4) for size in (5, 4, 4)]
    # Adam amplifies rounding where a gradient is nearly zero; a different weighting of tokens would show at 1e-3.
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 5e-5
    assert (seen["plain"] == seen["other"]) is (flags == LONG["fused"])
    if "packing_samples" in flags or not flags:
        assert {rows for rows, _ in seen["other"]} == {1}
    if limit is not None:
        assert max(rows * columns for rows, columns in seen["other"]) <= limit


@pytest.mark.parametrize("flags", [{"packing_samples": True}, {"max_tokens_per_micro_batch": 64}, {}], ids=str)
def test_samples_change_ranks_where_micro_batches_go_by_tokens(make: Make, flags: dict[str, Any]) -> None:
    trainer = (setup := make(**flags)).trainer
    assert trainer._roll_out(PromptStream(setup.loader, episodes=1, batch_size=4))
    records = trainer.replay_buffer.records
    with (  # another rank that has brought nothing
        mock.patch.object(FakeStrategy, "data_parallel_size", 2),
        mock.patch.object(setup.strategy, "gather_over_data", lambda mine: [mine]),
    ):
        plan = trainer._plan_epoch(0, 0)
    assert trainer.replay_buffer.records == records if not flags else trainer.replay_buffer.records != records
    for batch in plan if flags else []:
        mine = [trainer.replay_buffer.records[index] for index in batch.indices]
        tokens = [sum(record.length for record in mine if record.owner == rank) for rank in (0, 1)]
        assert abs(tokens[0] - tokens[1]) <= max(record.length for record in mine)


def test_a_sample_that_is_longer_than_a_micro_batch_may_be_ends_the_run_with_its_length(make: Make) -> None:
    with pytest.raises(ValueError, match=r"--max_tokens_per_micro_batch 6: sample \d+ of this step has (7|8|9) tokens"):
        make(max_tokens_per_micro_batch=6).fit()


def test_each_pass_over_a_buffer_meets_its_samples_in_another_order(make: Make) -> None:
    trainer = (setup := make()).trainer
    assert trainer._roll_out(PromptStream(setup.loader, episodes=1, batch_size=4))
    passes = ((0, 0), (0, 1), (1, 0))
    orders = [[batch.indices for batch in trainer._plan_epoch(step, epoch)] for step, epoch in passes]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
