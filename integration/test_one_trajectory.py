"""One script, one trajectory: the same seed on one process, FSDP2 and ZeRO 1, 2 and 3, and the table that shows it.

uv run nox -s integration_full -- -k table_of_trajectories -rP
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.engines.hf import decoding
from lightrft.engines.sampling import exponential_noise, noise_keys, noise_stream
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.testing import (
    RECIPES,
    Deviation,
    RankPool,
    Trajectory,
    compare,
    deviation_table,
    noise_floor,
    reference_trajectory,
    run_trajectory,
    save_tiny_model,
)
from lightrft.testing.trajectory import FLOORS, verdict
from lightrft.trainer import SPMDPPOTrainer
from lightrft.trainer.run import build

BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "FSDP2": {"fsdp": True},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
}
# That FSDP2 and ZeRO 3 follow these recipes on two ranks, their packages' own tests show; ZeRO 1 is ZeRO 2's code with
# whole gradients.
EACH = [pytest.param(name, marks=[] if name == "ZeRO 2" else [pytest.mark.full]) for name in BACKENDS]
# Experts change a model, not where a backend keeps gradients and states: the one that cuts the most stands for all.
FOR_EXPERTS = [pytest.param(name, marks=[] if name == "ZeRO 3" else [pytest.mark.full]) for name in BACKENDS]
# ZeRO 1 has a default run of its own, compared step by step with FSDP2's (test_train_command.py).
SAMPLING = [pytest.param(name, marks=[pytest.mark.full] if name == "ZeRO 1" else []) for name in BACKENDS]
RANKS = 2
STEPS = 10
GRPO: Mapping[str, Any] = {
    "engine_type": "hf",
    "enable_engine_sleep": False,
    "reward": "parity_reward:odd",
    "input_key": "input",
    "label_key": "label",
    "rollout_batch_size": 8,
    "n_samples_per_prompt": 4,
    "train_batch_size": 16,
    "prompt_max_len": 24,
    "generate_max_len": 12,
    "actor_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_ratio": 0.1,
    "max_norm": 0.5,
    "init_kl_coef": 0.01,
    "kl_estimator": "k3",  # with k1 the floor is higher: logits of one process move by 3e-3 when it is regrouped
    "num_episodes": 10,
    "max_steps": STEPS,
    "save_steps": -1,
    "plot_every": -1,
    "use_tensorboard": False,
}
REWARD = """
def odd(prompts, responses, labels, **extras):
    return [sum(ord(c) % 2 for c in response) / max(1, len(response)) for response in responses]
"""


# ---- optimizer steps ------------------------------------------------------------------------------------------------
def follow(settings: Mapping[str, Any]) -> dict[str, Trajectory]:
    """On a rank: every recipe on the backend that the settings choose."""
    found = {}
    for name, recipe in RECIPES.items():
        config = StrategyConfig(**recipe.settings(RANKS), **settings)
        found[name] = run_trajectory(get_strategy(config), recipe)
    return found


@pytest.fixture(scope="module")
def deviations(ranks: RankPool) -> Callable[[str], dict[str, Deviation]]:
    """By recipe, how far a backend is from one process."""

    @functools.cache
    def of(backend: str) -> dict[str, Deviation]:
        trajectories = ranks.run(follow, BACKENDS[backend])[0]
        return {name: compare(trajectories[name], reference_trajectory(RECIPES[name])) for name in RECIPES}

    return of


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", EACH)
def test_the_trajectory_is_that_of_one_process(
    deviations: Callable[[str], dict[str, Deviation]], backend: str, recipe: str
) -> None:
    assert verdict(deviations(backend)[recipe], RECIPES[recipe])[0] == []


# ---- sampled tokens -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Draws:
    """Every token of a run, row by row: in which rollout, of which sample (its noise), at which place it was drawn.

    :param margins: by how much the drawn token's perturbed logit leads the next one's.
    :param logits: before the noise, ``[tokens, vocabulary]``.
    """

    rollouts: torch.Tensor
    samples: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    margins: torch.Tensor
    logits: torch.Tensor

    def by_sample(self, rollout: int) -> dict[int, torch.Tensor]:
        """Row numbers of each sample of a rollout, in the order of their places."""
        rows = (self.rollouts == rollout).nonzero().flatten()
        samples = self.samples[rows]
        return {
            int(sample): (mine := rows[samples == sample])[self.places[mine].argsort()] for sample in samples.unique()
        }


def sample_tokens(settings: Mapping[str, Any], folder: Path, output_dir: Path) -> dict[str, torch.Tensor]:
    """On a rank: train by GRPO through the real trainer, and return :class:`Draws`, by field."""
    config = StrategyConfig(
        **{**GRPO, "micro_train_batch_size": 4, "micro_rollout_batch_size": 16, **settings},
        pretrain=str(folder / "model"),
        prompt_data=str(folder / "prompts.jsonl"),
        output_dir=str(output_dir),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(SPMDPPOTrainer, "_plot", lambda self: None)  # curves take longer than a step
        rollouts = _record(patch)
        strategy = get_strategy(config)
        trainer, loader, _ = build(strategy, config, output_dir)
        trainer.fit(config, loader)
    return vars(joined(rollouts))


def _record(patch: pytest.MonkeyPatch) -> list[Draws]:
    """Let the engine's decoder note what it draws; one entry for each rollout."""
    rollouts: list[Draws] = []
    noted: list[tuple[torch.Tensor, ...]] = []
    draw, run = decoding.draw, decoding.Decoder.run

    def noting_draw(
        logits: torch.Tensor, index: torch.Tensor, rows: Any, shape: Any, ahead: torch.Tensor | None
    ) -> Any:
        token, logprob = draw(logits, index, rows, shape, ahead)
        ids = torch.arange(logits.shape[-1], dtype=torch.int32)
        noise = exponential_noise(noise_keys(rows.stream, index), ids)
        scores = logits.float() / rows.temperature.unsqueeze(1) - noise.log()
        best = scores.topk(2).values
        noted.append((rows.stream.clone(), index.clone(), token.clone(), best[:, 0] - best[:, 1], logits.clone()))
        return token, logprob

    def noting_run(self: Any, samples: Sequence[Any], deadline: float | None = None) -> Any:
        responses = run(self, samples, deadline)
        streams = noise_stream(torch.tensor([sample.seed for sample in samples])).tolist()
        lengths = {stream: len(response.tokens) for stream, response in zip(streams, responses, strict=True)}
        stream, index, token, margin, logits = (torch.cat(parts) for parts in zip(*noted, strict=True))
        # A finished row goes on until it leaves the batch; what it draws then is thrown away.
        real = index < torch.tensor([lengths[key] for key in stream.tolist()])
        number = torch.full_like(index, len(rollouts))
        rollouts.append(Draws(*(part[real] for part in (number, stream, index, token, margin, logits))))
        noted.clear()
        return responses

    patch.setattr(decoding, "draw", noting_draw)
    patch.setattr(decoding.Decoder, "run", noting_run)
    return rollouts


def joined(parts: Sequence[Draws]) -> Draws:
    return Draws(*(torch.cat([getattr(part, name) for part in parts]) for name in Draws.__dataclass_fields__))


@dataclass(frozen=True)
class Agreement:
    """How two runs' tokens agree.

    :param equal: tokens up to the first divergence. :param total: of the reference.
    :param margins: of the reference at each token where a sample first diverged, in the first rollout that has any.
    :param errors: largest difference of a logit in each rollout, over what both runs drew after the same tokens.
    """

    equal: int
    total: int
    margins: list[float]
    errors: list[float]

    def __str__(self) -> str:
        said = f"all {self.total} equal" if not self.margins else f"{self.equal} of {self.total} equal, margin "
        return said + ", ".join(f"{margin:.0e}" for margin in self.margins) + f"; error {max(self.errors):.1e}"


def agreement(actual: Draws, expected: Draws) -> Agreement:
    """Compare rollout by rollout, up to the first in which a sample diverges: afterwards the runs learn from others.

    :raises AssertionError: they drew other samples.
    """
    equal, margins, errors = 0, [], []
    for rollout in range(int(expected.rollouts.max()) + 1):
        mine, theirs = actual.by_sample(rollout), expected.by_sample(rollout)
        assert mine.keys() == theirs.keys(), f"rollout {rollout}: other samples"
        worst = 0.0
        for sample, rows in theirs.items():
            for place, row in enumerate(rows):
                other = mine[sample][place]
                worst = max(worst, (actual.logits[other] - expected.logits[row]).abs().max().item())
                if actual.tokens[other] != expected.tokens[row]:
                    margins.append(expected.margins[row].item())
                    break
                equal += 1
            else:
                assert len(mine[sample]) == len(rows), "equal tokens end at the same place"
        errors.append(worst)
        if margins:
            break
    return Agreement(equal, len(expected.tokens), margins, errors)


@dataclass(frozen=True)
class Sampling:
    """The GRPO runs of one kind of model against the reference: that regrouped, and by name those of the backends."""

    reference: Draws
    floor: Agreement
    on: Callable[[str], Agreement]

    @property
    def logits_error(self) -> float:
        """What rounding may do to a logit."""
        return FLOORS * max(self.floor.errors)


def run_grpo(kind: str, folder: Path, pools: Any) -> Sampling:
    save_tiny_model(kind, folder / "model")
    (folder / "parity_reward.py").write_text(REWARD)
    questions = [{"input": f"count the stones : {'one two ' * (i % 3)}{i}", "label": str(i)} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))

    def drawn(world_size: int, name: str, **settings: Any) -> Draws:
        ranks = pools(world_size).run(sample_tokens, settings, folder, folder / name)
        return joined([Draws(**of_rank) for of_rank in ranks])

    reference = drawn(1, "whole", strategy="fake", micro_train_batch_size=16)
    regrouped = agreement(drawn(1, "regrouped", strategy="fake", micro_train_batch_size=2), reference)

    @functools.cache
    def on(backend: str) -> Agreement:
        return agreement(drawn(RANKS, backend, **BACKENDS[backend]), reference)

    return Sampling(reference, regrouped, on)


@pytest.fixture(scope="module")
def dense(rank_pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Sampling:
    return run_grpo("qwen2", tmp_path_factory.mktemp("qwen2"), rank_pools)


@pytest.fixture(scope="module")
def mixture(rank_pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Sampling:
    return run_grpo("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), rank_pools)


def assert_same_tokens(sampling: Sampling, backend: str) -> None:
    found = sampling.on(backend)
    common = min(len(found.errors), len(sampling.floor.errors))
    assert max(found.errors[:common]) <= sampling.logits_error
    assert all(margin <= 2 * sampling.logits_error for margin in found.margins), found
    assert found.margins or found.equal == found.total


@pytest.mark.parametrize("backend", SAMPLING)
def test_ten_steps_of_grpo_sample_the_same_tokens(dense: Sampling, backend: str) -> None:
    """Until one diverges whose margin is below what rounding may do to the two logits."""
    assert_same_tokens(dense, backend)


@pytest.mark.parametrize("backend", FOR_EXPERTS)
def test_a_mixture_of_experts_samples_the_same_tokens(mixture: Sampling, backend: str) -> None:
    assert_same_tokens(mixture, backend)


def test_the_tokens_that_agree_were_drawn_from_a_policy_that_learns(dense: Sampling) -> None:
    assert int(dense.reference.rollouts.max()) == STEPS - 1
    first, last = (dense.reference.logits[dense.reference.rollouts == n] for n in (0, STEPS - 1))
    assert (first.mean(0) - last.mean(0)).abs().max() > 1000 * dense.logits_error
    assert dense.reference.margins.min() > 0


# ---- the table ------------------------------------------------------------------------------------------------------
@pytest.mark.full
def test_the_table_of_trajectories(
    deviations: Callable[[str], dict[str, Deviation]], dense: Sampling, mixture: Sampling
) -> None:
    """Largest over the recipes; ``-rP`` or ``-s`` shows it."""
    floors = {name: noise_floor(recipe) for name, recipe in RECIPES.items()}
    rows = {"one process (the floor)": largest(floors.values())}
    rows |= {backend: largest(deviations(backend).values()) for backend in BACKENDS}
    columns = {}
    for title, found in {"tokens, Qwen2": dense, "tokens, Qwen3-MoE": mixture}.items():
        said = map(str, (found.floor, *map(found.on, BACKENDS)))
        columns[f"{title} (smallest margin {found.reference.margins.min():.0e})"] = dict(zip(rows, said, strict=True))
    table = deviation_table(rows, **columns)
    sys.stdout.write(f"\n{table}")
    assert table.count("\n") == 2 + len(rows)


def largest(found: Any) -> Deviation:
    figures = [max(column) for column in zip(*(deviation.figures() for deviation in found), strict=True)]
    return Deviation(**dict(zip(("first_gradient", "loss", "grad_norm", "weights"), figures, strict=True)))
