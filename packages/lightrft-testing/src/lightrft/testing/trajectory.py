"""The reference trajectory: what "the same seed trains alike on every backend" means, measured.

In floating point no two summation orders agree, and Adam amplifies the difference where a gradient is nearly zero.
The yardstick is therefore one process against itself: :func:`noise_floor` runs the recipe on the whole batch, and again
with the batch cut into micro-batches. A backend within :data:`FLOORS` times that distance computes the same thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.schedules import make_scheduler
from lightrft.strategy.strategy_base import StrategyBase

from .tiny_models import VOCABULARY, tiny_model

# How many times further than one process from itself a backend may be.
FLOORS = 4.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A short training run with everything in it that can go wrong.

    :param kind: a tiny model. :param steps: optimizer steps. :param rows: sequences a step, over all ranks.
    :param accumulation: micro-batches of a step on each rank.
    :param max_norm: small enough to clip every step. :param warmup: share of the steps.
    """

    kind: str = "qwen2"
    steps: int = 20
    rows: int = 8
    length: int = 12
    accumulation: int = 1
    learning_rate: float = 1e-3
    max_norm: float = 0.5
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.2
    seed: int = 0

    def settings(self, ranks: int) -> dict[str, Any]:
        """The configuration of a strategy on so many data ranks.

        :raises ValueError: the rows cannot be shared out evenly.
        """
        micro, rest = divmod(self.rows, ranks * self.accumulation)
        if rest or not micro:
            raise ValueError(
                f"{self.rows} rows do not share out over {ranks} ranks × {self.accumulation} micro-batches"
            )
        return {
            "seed": self.seed,
            "max_norm": self.max_norm,
            "micro_train_batch_size": micro,
            "train_batch_size": self.rows,
            "actor_learning_rate": self.learning_rate,
            "l2": self.weight_decay,
        }

    def batch(self, step: int) -> torch.Tensor:
        """Token ids ``[rows, length]`` of a step, the same everywhere."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + step)
        return torch.randint(7, VOCABULARY, (self.rows, self.length), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a run left behind. ``first_moments`` are Adam's after the first step: the gradient at identical weights.

    :param losses: global mean of each step. :param grad_norms: before clipping. :param learning_rates: after each step.
    :param weights: whole, by module name, at the end.
    """

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    first_moments: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far two trajectories are apart, at the worst step or element.

    :param first_gradient: relative to the whole gradient's norm, at identical weights. :param loss: absolute.
    :param grad_norm: relative. :param weights: absolute.
    """

    first_gradient: float
    loss: float
    grad_norm: float
    weights: float

    def within(self, floor: Deviation, times: float = FLOORS) -> list[str]:
        """What exceeds ``times`` the floor, in words; empty where nothing does."""
        return [
            f"{name} deviates by {mine:.2e}, {times:g} × the noise floor is {times * bound:.2e}"
            for name, mine, bound in zip(FIELDS, self.figures(), floor.figures(), strict=True)
            if mine > times * bound
        ]

    def figures(self) -> tuple[float, ...]:
        """The four numbers in the order of :data:`FIELDS`."""
        return self.first_gradient, self.loss, self.grad_norm, self.weights


FIELDS = ("gradient at identical weights", "loss", "gradient norm", "weights")


def run_trajectory(strategy: StrategyBase, recipe: Recipe) -> Trajectory:
    """Train a tiny model by the recipe. Every rank must call.

    :param strategy: made with ``recipe.settings(ranks)``.
    """
    model: nn.Module = strategy.prepare(tiny_model(recipe.kind, seed=recipe.seed))
    optimizer = strategy.create_optimizer(model)
    scheduler = make_scheduler(recipe.schedule, optimizer, recipe.steps, recipe.warmup)
    micro = strategy.config.micro_train_batch_size
    losses, norms, rates = [], [], []
    first: dict[str, torch.Tensor] = {}
    for step in range(recipe.steps):
        rows, total = recipe.batch(step), 0.0
        for index in range(strategy.accumulated_gradient):
            start = (index * strategy.data_parallel_size + strategy.data_parallel_rank) * micro
            mine = rows[start : start + micro].to(strategy.device)
            logits = model(input_ids=mine).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
            total += loss.item() / strategy.accumulated_gradient
            strategy.backward(loss, model, optimizer)
            result = strategy.optimizer_step(optimizer, model, scheduler)
        if not result.stepped or result.grad_norm is None:
            raise AssertionError(f"step {step} of {recipe} was not taken: {result}")
        losses.append(strategy.all_reduce(total))
        norms.append(result.grad_norm)
        rates.append(optimizer.param_groups[0]["lr"])
        if step == 0:
            items = strategy.iter_state(model, optimizer)
            first = {item.name: item.moments["exp_avg"].float() for item in items if item.moments}
    weights = {item.name: item.weight.float() for item in strategy.iter_state(model)}
    return Trajectory(losses=losses, grad_norms=norms, learning_rates=rates, first_moments=first, weights=weights)


def compare(actual: Trajectory, expected: Trajectory) -> Deviation:
    """How far ``actual`` is from ``expected``.

    :raises AssertionError: their parameters or learning rates differ, which no rounding explains.
    """
    if list(actual.weights) != list(expected.weights) or actual.learning_rates != expected.learning_rates:
        raise AssertionError("the trajectories are not of one model and one schedule")
    whole = torch.stack([moment.norm() for moment in expected.first_moments.values()]).norm().item()
    return Deviation(
        first_gradient=max(
            (actual.first_moments[name] - moment).norm().item() / whole
            for name, moment in expected.first_moments.items()
        ),
        loss=_largest(abs(a - b) for a, b in zip(actual.losses, expected.losses, strict=True)),
        grad_norm=_largest(abs(a - b) / b for a, b in zip(actual.grad_norms, expected.grad_norms, strict=True)),
        weights=_largest((actual.weights[n] - w).abs().max().item() for n, w in expected.weights.items()),
    )


def reference_trajectory(recipe: Recipe) -> Trajectory:
    """One process on the whole batch at once. Works on any rank, without the others."""
    whole = replace(recipe, accumulation=1)
    return run_trajectory(FakeStrategy(**whole.settings(1)), whole)


def noise_floor(recipe: Recipe, reference: Trajectory | None = None) -> Deviation:
    """One process against itself with its micro-batches regrouped: the worst of every way to halve them."""
    reference = reference or reference_trajectory(recipe)
    deviations = []
    parts = 2
    while recipe.rows % parts == 0 and parts <= recipe.rows:
        regrouped = replace(recipe, accumulation=parts)
        deviations.append(compare(run_trajectory(FakeStrategy(**regrouped.settings(1)), regrouped), reference))
        parts *= 2
    return Deviation(
        first_gradient=max(d.first_gradient for d in deviations),
        loss=max(d.loss for d in deviations),
        grad_norm=max(d.grad_norm for d in deviations),
        weights=max(d.weights for d in deviations),
    )


def deviation_table(rows: Mapping[str, Deviation]) -> str:
    """A Markdown table, one line for each named deviation."""
    lines = ["| |" + "|".join(f" {name} " for name in FIELDS) + "|", "|---" * (len(FIELDS) + 1) + "|"]
    lines += [f"| {name} |" + "|".join(f" {x:.1e} " for x in row.figures()) + "|" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _largest(values: Iterable[float]) -> float:
    return max(values, default=0.0)
