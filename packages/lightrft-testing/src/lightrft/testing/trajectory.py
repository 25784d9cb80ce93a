"""The reference trajectory: measures that the same seed trains the same on every backend.

In floating point the result depends on the order of summation, and Adam amplifies the difference where a gradient is
nearly zero. So the yardstick is one process compared with itself: :func:`noise_floor` runs the recipe on the whole
batch, and again with the batch split into micro-batches. A backend within :data:`FLOORS` times that distance computes
the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.schedules import make_scheduler
from lightrft.strategy.strategy_base import StepResult, StrategyBase

from .tiny_models import VOCABULARY, tiny_model

# Largest distance of a backend, in multiples of the distance of one process from itself.
FLOORS = 4.0
# What rounding to bfloat16 (8 bits of precision) may change, relatively.
BF16_ROUNDING = 2.0**-9
# The critic's loss is so small that its norm is never clipped, while the actor's always is.
CRITIC_LOSS = 1 / 64
# A norm with which clipping is on, but never changes anything.
NEVER_CLIPS = 1e6
EPS = torch.finfo(torch.float32).eps
# How often a noise floor perturbs the gradients.
SHAKEN = 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A short training run with everything that can differ between backends.

    :param kind: a tiny model. :param steps: optimizer steps. :param rows: sequences of a whole batch, over all ranks.
    :param accumulation: micro-batches of a step on each rank.
    :param max_norm: small enough to clip every step; 0 clips never. :param warmup: share of the steps.
    :param frozen: parameters with this text in their names are frozen; empty: all train.
    :param critic: train a second model too, with its own optimizer, learning rate and norm.
    :param uneven: rows of different lengths under one token mean, and batches that are short: some ranks then have
        fewer micro-batches, or none.
    :param poisoned: a step at which the actor's gradient is not finite on the last rank.
    :param bf16: compute in bfloat16.
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
    frozen: str = ""
    critic: bool = False
    uneven: bool = False
    poisoned: int | None = None
    bf16: bool = False

    def settings(self, ranks: int) -> dict[str, Any]:
        """The configuration of a strategy on so many data ranks.

        :raises ValueError: the rows cannot be split evenly.
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
            "critic_learning_rate": 2 * self.learning_rate,
            "l2": self.weight_decay,
            "bf16": self.bf16,
        }

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids ``[rows, length]`` of a step and the length of each row ``[rows]``, the same everywhere."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + step)
        ids = torch.randint(7, VOCABULARY, (self.rows, self.length), generator=generator)
        lengths = torch.full((self.rows,), self.length)
        if self.uneven:
            lengths = torch.randint(3, self.length + 1, (self.rows,), generator=generator)
            count = (self.rows, self.rows // 2 + 1, self.rows, 1)[step % 4]
            ids, lengths = ids[:count], lengths[:count]
        return ids, lengths

    def models(self) -> dict[str, nn.Module]:
        """The models to train by role, with the same weights everywhere."""
        made = {"actor": tiny_model(self.kind, seed=self.seed)}
        if self.critic:
            made["critic"] = tiny_model(self.kind, seed=self.seed + 1)
            made["critic"].is_critic = True
        for model in made.values():
            for name, parameter in model.named_parameters():
                if self.frozen and self.frozen in name:
                    parameter.requires_grad_(False)
        return made


RECIPES: Mapping[str, Recipe] = {
    "dense": Recipe(),
    "tied": Recipe(kind="qwen2_tied", max_norm=0.0, frozen="layers.0."),
    "moe": Recipe(kind="qwen3_moe", accumulation=4, poisoned=7),
    "pair": Recipe(accumulation=2, critic=True, uneven=True),
}
"""Every variation, in as few runs as hold it: each takes a second or two."""


def every_recipe() -> list[Recipe]:
    """The product of what :data:`RECIPES` varies, for a long campaign."""
    more = {"frozen": "layers.0.", "critic": True, "uneven": True, "poisoned": 7}
    return [
        Recipe(kind=kind, accumulation=accumulation, max_norm=max_norm, **extras)
        for kind, accumulation, max_norm, extras in itertools.product(
            ("qwen2", "qwen2_tied", "qwen3_moe"), (1, 4), (0.5, 0.0, NEVER_CLIPS), ({}, more)
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a run left behind, of both models one after the other where there are two.

    :param losses: global mean of each step. :param grad_norms: before clipping. :param learning_rates: after each step.
    :param skipped: steps that were not taken.
    :param first_moments: Adam's after the first step, by ``role/name``: the clipped gradient at identical weights.
    :param weights: whole, by ``role/name``, at the end.
    """

    losses: Mapping[str, Sequence[float]]
    grad_norms: Mapping[str, Sequence[float]]
    learning_rates: Mapping[str, Sequence[float]]
    skipped: Mapping[str, Sequence[int]]
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
            if not mine <= times * bound
        ]

    def figures(self) -> tuple[float, ...]:
        """The four numbers in the order of :data:`FIELDS`."""
        return self.first_gradient, self.loss, self.grad_norm, self.weights


FIELDS = ("gradient at identical weights", "loss", "gradient norm", "weights")


class _Role:
    """One of the models of a run, and what happened to it."""

    def __init__(self, strategy: StrategyBase, recipe: Recipe, role: str, model: nn.Module) -> None:
        self.strategy, self.recipe, self.role = strategy, recipe, role
        self.factor = CRITIC_LOSS if role == "critic" else 1.0
        self.model: nn.Module = strategy.prepare(model)
        self.optimizer = strategy.create_optimizer(self.model)
        self.scheduler = make_scheduler(recipe.schedule, self.optimizer, recipe.steps, recipe.warmup)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.skipped: list[int] = []
        self.first: dict[str, torch.Tensor] = {}

    def step(self, number: int) -> None:
        strategy, recipe = self.strategy, self.recipe
        ids, lengths = recipe.batch(number)
        rank, ranks = strategy.data_parallel_rank, strategy.data_parallel_size
        micro = strategy.config.micro_train_batch_size
        count = math.ceil(len(ids) / (ranks * micro))
        tokens, total = int((lengths - 1).sum()), 0.0
        result = StepResult(stepped=False)
        for index in range(count):
            start = (index * ranks + rank) * micro
            mine = slice(start, start + micro) if start < len(ids) else slice(0, 1)  # a forward pass is collective
            share = int((lengths[mine] - 1).sum()) / tokens if start < len(ids) else 0.0
            loss = self.factor * _token_mean(self.model, ids[mine].to(strategy.device), lengths[mine])
            total += loss.item() * share
            if self._poisoned(number) and index == 0 and rank == ranks - 1:
                loss = loss * math.inf
            # Whole batches take the strategy's own division, short ones say what they are a share of.
            given: dict[str, Any] = {"scale": share, "boundary": index == count - 1} if recipe.uneven else {}
            strategy.backward(loss, self.model, self.optimizer, **given)
            result = strategy.optimizer_step(self.optimizer, self.model, self.scheduler, name=self.role)
        self._note(number, strategy.all_reduce(total, "sum"), result)

    def _poisoned(self, number: int) -> bool:
        return self.role == "actor" and number == self.recipe.poisoned

    def _note(self, number: int, loss: float, result: StepResult) -> None:
        if result.skipped:
            self.skipped.append(number)
        if not (result.stepped or result.skipped) or result.grad_norm is None:
            raise AssertionError(f"step {number} of {self.recipe} ended between two boundaries: {result}")
        self.losses.append(loss)
        self.norms.append(result.grad_norm)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        if number == 0:
            items = self.strategy.iter_state(self.model, self.optimizer)
            self.first = {item.name: item.moments["exp_avg"].float() for item in items if item.moments}


def _token_mean(model: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens within each row's length, 0-d."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    mask = torch.arange(losses.shape[1], device=ids.device) < (lengths - 1).to(ids.device).unsqueeze(1)
    return losses.masked_fill(~mask, 0.0).sum() / mask.sum()


def run_trajectory(
    strategy: StrategyBase, recipe: Recipe, touch: Callable[[nn.Module], None] = lambda model: None
) -> Trajectory:
    """Train tiny models by the recipe. Every rank must call.

    :param strategy: made with ``recipe.settings(ranks)``.
    :param touch: what to do to each model before it is prepared.
    """
    models = recipe.models()
    for model in models.values():
        touch(model)
    roles = [_Role(strategy, recipe, role, model) for role, model in models.items()]
    for number in range(recipe.steps):
        for role in roles:
            role.step(number)
    return Trajectory(
        losses={role.role: role.losses for role in roles},
        grad_norms={role.role: role.norms for role in roles},
        learning_rates={role.role: role.rates for role in roles},
        skipped={role.role: role.skipped for role in roles},
        first_moments={f"{role.role}/{name}": moment for role in roles for name, moment in role.first.items()},
        weights={
            f"{role.role}/{item.name}": item.weight.float()
            for role in roles
            for item in strategy.iter_state(role.model)
        },
    )


def compare(actual: Trajectory, expected: Trajectory) -> Deviation:
    """How far ``actual`` is from ``expected``.

    :raises AssertionError: their parameters, learning rates or skipped steps differ, which no rounding explains.
    """
    for name in ("learning_rates", "skipped"):
        mine, theirs = getattr(actual, name), getattr(expected, name)
        if mine != theirs:
            raise AssertionError(f"{name.replace('_', ' ')} differ: {mine}, not {theirs}")
    for name in ("first_moments", "weights"):
        if differing := set(getattr(actual, name)) ^ set(getattr(expected, name)):
            raise AssertionError(f"{name.replace('_', ' ')} are not of one model: {sorted(differing)}")
    whole = torch.stack([moment.norm() for moment in expected.first_moments.values()]).norm().item()
    return Deviation(
        first_gradient=_largest(
            (actual.first_moments[name] - moment).norm().item() / whole
            for name, moment in expected.first_moments.items()
        ),
        loss=_largest(abs(a - b) for a, b in _pairs(actual.losses, expected.losses)),
        grad_norm=_largest(_relative(a, b) for a, b in _pairs(actual.grad_norms, expected.grad_norms)),
        weights=_largest((actual.weights[n] - w).abs().max().item() for n, w in expected.weights.items()),
    )


def reference_trajectory(recipe: Recipe) -> Trajectory:
    """One process on the whole batch at once. Works on any rank, without the others. Remembered: do not change it."""
    return _reference(replace(recipe, accumulation=1))


@functools.lru_cache(maxsize=16)
def _reference(recipe: Recipe) -> Trajectory:
    return run_trajectory(FakeStrategy(**recipe.settings(1)), recipe)


def cast_trajectory(recipe: Recipe) -> Trajectory:
    """The recipe in one process whose fp32 weights are cast to bf16 in the forward pass, as backends cast them."""
    return run_trajectory(FakeStrategy(**recipe.settings(1)), recipe, _cast)


def _cast(model: nn.Module) -> None:
    own = model.forward

    def forward(**inputs: Any) -> Any:
        model.forward = own
        cast = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
        try:
            return torch.func.functional_call(model, cast, (), inputs)
        finally:
            model.forward = forward

    model.forward = forward


def noise_floor(recipe: Recipe) -> Deviation:
    """One process against itself with its micro-batches regrouped: the worst of every way to halve them.

    Regrouping leaves the order alone in which a norm's squares are summed, and shards do not: the rounding of that sum
    counts too. And no gradient is asked to be nearer than two units in its last place: a backend's kernels may be
    others. What one process makes of gradients that are so far off, three times at random, counts as well: Adam
    amplifies it wherever a gradient is nearly zero.
    """
    *_, whole = rising_floors(recipe)
    return whole


def rising_floors(recipe: Recipe) -> Iterator[Deviation]:
    """The noise floor run by run, up to the whole one: what lies within one of them lies within all that follow."""
    recipe = replace(recipe, accumulation=1)
    floor = Deviation(first_gradient=2 * EPS, loss=0.0, grad_norm=_norm_rounding(recipe), weights=0.0)
    for number in range(SHAKEN + _halvings(recipe)):
        found = _disturbed(recipe, number)
        floor = Deviation(**{f.name: max(getattr(floor, f.name), getattr(found, f.name)) for f in fields(Deviation)})
        yield floor


def verdict(deviation: Deviation, recipe: Recipe, times: float = FLOORS) -> tuple[list[str], Deviation]:
    """What exceeds ``times`` the noise floor, in words, and the floor, of which no more is computed than it takes."""
    for floor in rising_floors(recipe):
        if not (faults := deviation.within(floor, times)):
            break
    return faults, floor


def _halvings(recipe: Recipe) -> int:
    """How often the rows can be halved."""
    return (recipe.rows & -recipe.rows).bit_length() - 1


@functools.lru_cache(maxsize=512)
def _disturbed(recipe: Recipe, number: int) -> Deviation:
    """One process against itself: first with its gradients shaken, then with its rows in 2, 4, ... micro-batches."""
    touch, other = functools.partial(_shake_gradients, number), recipe
    if number >= SHAKEN:
        touch, other = _leave, replace(recipe, accumulation=2 ** (number - SHAKEN + 1))
    run = run_trajectory(FakeStrategy(**other.settings(1)), other, touch)
    return compare(run, reference_trajectory(recipe))


def _leave(model: nn.Module) -> None:
    """As it is."""


def _shake_gradients(seed: int, model: nn.Module) -> None:
    """Let each gradient tensor come out two units in the last place of its norm off, in a random direction."""
    generator = torch.Generator().manual_seed(seed)

    def shake(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        size = 2 * EPS * gradient.norm() / math.sqrt(gradient.numel())
        noise = size * torch.randn(gradient.shape, generator=generator).to(gradient.device)
        gradient.add_(noise.masked_fill_(gradient == 0, 0.0))  # what is exactly zero is so everywhere

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(shake)


@functools.lru_cache(maxsize=64)
def _norm_rounding(recipe: Recipe) -> float:
    """Relative error of one process's own norm of the first gradient, against double precision."""
    whole = replace(recipe, accumulation=1, steps=1, max_norm=0.0, poisoned=None)
    trajectory, errors = run_trajectory(FakeStrategy(**whole.settings(1)), whole), []
    for role, norms in trajectory.grad_norms.items():
        moments = [m.double().norm() for name, m in trajectory.first_moments.items() if name.startswith(f"{role}/")]
        exact = torch.stack(moments).norm().item() / (1 - StrategyConfig().adam_betas[0])
        errors.append(_relative(norms[0], exact))
    return max(errors)


def clipping_faults(recipe: Recipe, reference: Trajectory) -> list[str]:
    """Whether the reference clips as the recipe means it: the actor at every step, the critic at none.

    A run that does not clip proves nothing about clipping.
    """
    if recipe.max_norm == 0:
        return []
    faults = []
    for role, norms in reference.grad_norms.items():
        finite = [norm for norm in norms if math.isfinite(norm)]
        clips = role == "actor" and recipe.max_norm < NEVER_CLIPS
        if (min(finite) <= recipe.max_norm) if clips else (max(finite) >= recipe.max_norm):
            faults.append(f"{role}: norms from {min(finite):.3g} to {max(finite):.3g} against {recipe.max_norm:g}")
    return faults


def deviation_table(rows: Mapping[str, Deviation], **columns: Mapping[str, str]) -> str:
    """A Markdown table, one line for each named deviation.

    :param columns: further columns by title, each with a cell by row name.
    """
    titles = [*FIELDS, *columns]
    lines = ["| |" + "|".join(f" {name} " for name in titles) + "|", "|---" * (len(titles) + 1) + "|"]
    for name, row in rows.items():
        cells = [*(f"{x:.1e}" for x in row.figures()), *(cells.get(name, "") for cells in columns.values())]
        lines.append(f"| {name} |" + "|".join(f" {cell} " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def _pairs(
    actual: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]]
) -> Iterable[tuple[float, float]]:
    for role, values in expected.items():
        yield from zip(actual[role], values, strict=True)


def _relative(actual: float, expected: float) -> float:
    if not math.isfinite(expected):  # one norm reads nan where another reads inf
        return math.inf if math.isfinite(actual) else 0.0
    return abs(actual - expected) / expected


def _largest(values: Iterable[float]) -> float:
    """The worst of them, and one that is not a number is worse than any."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)
