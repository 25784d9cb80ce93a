"""The meaning of a step: what backward adds, when the optimizer steps, the norm, skipped steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightrft.strategy.strategy_base import StepResult, StrategyBase
from lightrft.testing.faults import poison_gradient

from .claims import (
    StrategyClaims,
    constant_schedule,
    gradients_of,
    moments_of,
    next_token_loss,
    on_ranks,
    weights_of,
)


class TrainingClaims(StrategyClaims):
    """backward and optimizer_step."""

    @pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "qwen3_moe"])
    @pytest.mark.parametrize("accumulation", [1, 2])
    @on_ranks
    def test_gradients_equal_those_of_one_process(self, accumulation: int, kind: str) -> None:
        strategy = self.strategy(accumulation=accumulation)
        model = strategy.prepare(self.model(kind))
        optimizer = strategy.create_optimizer(model)
        result = self.train(strategy, model, optimizer, accumulation=accumulation)[0]
        reference = self.reference(accumulation=accumulation)
        plain = reference.prepare(self.model(kind))
        plain_optimizer = reference.create_optimizer(plain)
        expected = self.train(reference, plain, plain_optimizer)[0]
        self.assert_same_gradients(
            gradients_of(strategy, model, optimizer), gradients_of(reference, plain, plain_optimizer)
        )
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=self.gradient_tolerance)
        self.assert_same_weights(weights_of(strategy, model), weights_of(reference, plain))

    @on_ranks
    def test_the_optimizer_acts_only_at_the_accumulation_boundary(self) -> None:
        strategy = self.strategy(accumulation=3)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        scheduler = constant_schedule(optimizer)
        before = weights_of(strategy, model)
        rows = self.rows(strategy.config.train_batch_size)
        for index in range(3):
            strategy.backward(next_token_loss(model, self.share(strategy, rows, 2, index)), model, optimizer)
            result = strategy.optimizer_step(optimizer, model, scheduler)
            assert result.stepped == (index == 2)
            assert not result.skipped
            assert (result.grad_norm is None) == (index < 2)
            assert scheduler.last_epoch == (1 if index == 2 else 0)
            if index < 2:
                self.assert_same_weights(weights_of(strategy, model), before, exact=True)
        after = weights_of(strategy, model)
        assert any(not torch.equal(after[name], before[name]) for name in before)

    @on_ranks
    def test_a_step_without_a_backward_does_nothing(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        before = weights_of(strategy, model)
        assert not strategy.optimizer_step(optimizer, model, None).stepped
        self.assert_same_weights(weights_of(strategy, model), before, exact=True)

    @pytest.mark.parametrize("split", ["one", "per row", "uneven", "idle rank"])
    @on_ranks
    def test_shares_of_a_global_mean_do_not_depend_on_the_split(self, split: str) -> None:
        """A token mean over rows of different lengths; ranks with fewer micro-batches fill up with empty ones."""
        total = 2 * self.world_size
        rows, lengths = self.rows(total), [3 + 2 * index for index in range(total)]
        reference = self.reference(train_batch_size=total)
        plain = reference.prepare(self.model())
        plain_optimizer = reference.create_optimizer(plain)
        strategy = self.strategy(train_batch_size=total)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        _token_mean_step(reference, plain, plain_optimizer, rows, lengths, [list(range(total))], total)
        mine = _split(split, total, strategy.data_parallel_rank, self.world_size)
        result = _token_mean_step(strategy, model, optimizer, rows, lengths, mine, total)
        assert result.stepped
        self.assert_same_gradients(
            gradients_of(strategy, model, optimizer), gradients_of(reference, plain, plain_optimizer)
        )

    @pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e6])
    @on_ranks
    def test_clipping_is_global_and_zero_means_none(self, max_norm: float) -> None:
        strategy = self.strategy(max_norm=max_norm)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        norm = self.train(strategy, model, optimizer)[0].grad_norm
        reference = self.reference(max_norm=0.0)
        plain = reference.prepare(self.model())
        plain_optimizer = reference.create_optimizer(plain)
        unclipped = self.train(reference, plain, plain_optimizer)[0].grad_norm
        assert norm is not None
        assert unclipped is not None
        assert norm == pytest.approx(unclipped, rel=self.gradient_tolerance), "the norm is that before clipping"
        assert unclipped > 0.05
        factor = max_norm / (unclipped + 1e-6) if max_norm == 0.05 else 1.0
        expected = {name: g * factor for name, g in gradients_of(reference, plain, plain_optimizer).items()}
        self.assert_same_gradients(gradients_of(strategy, model, optimizer), expected)

    @on_ranks
    def test_the_norm_is_of_this_model_and_of_nobody_elses(self) -> None:
        norms = {}
        for name, strategy in (("reference", self.reference()), ("tested", self.strategy(max_norm=0.05))):
            actor = strategy.prepare(self.model())
            critic = strategy.prepare(self.model(seed=1))
            actor_optim = strategy.create_optimizer(actor)
            critic_optim = strategy.create_optimizer(critic)  # the later one must not replace the actor
            rows = self.rows(strategy.config.train_batch_size)
            micro = strategy.config.micro_train_batch_size
            for factor, model, optimizer in ((1.0, actor, actor_optim), (50.0, critic, critic_optim)):
                loss = factor * next_token_loss(model, self.share(strategy, rows, micro, 0))
                strategy.backward(loss, model, optimizer)
            norms[name] = [
                strategy.optimizer_step(optimizer, model, None, name=role).grad_norm
                for role, model, optimizer in (("actor", actor, actor_optim), ("critic", critic, critic_optim))
            ]
            if name == "tested":  # both are clipped, each by its own norm
                for model, optimizer in ((actor, actor_optim), (critic, critic_optim)):
                    clipped = gradients_of(strategy, model, optimizer).values()
                    total = torch.stack([g.norm() for g in clipped]).norm().item()
                    assert total == pytest.approx(0.05, rel=1e-3)
        assert norms["tested"] == pytest.approx(norms["reference"], rel=self.gradient_tolerance)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @on_ranks
    def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(self, value: float) -> None:
        strategy = self.strategy(max_norm=1.0)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        scheduler = constant_schedule(optimizer)
        self.train(strategy, model, optimizer, scheduler=scheduler)
        weights, moments = weights_of(strategy, model), moments_of(strategy, model, optimizer)
        rows = self.rows(strategy.config.train_batch_size, seed=9)
        loss = next_token_loss(model, self.share(strategy, rows, 2, 0))
        if strategy.rank == self.world_size - 1:
            loss = loss * value
        strategy.backward(loss, model, optimizer)
        result = strategy.optimizer_step(optimizer, model, scheduler, name="actor")
        assert result.skipped
        assert not result.stepped
        assert result.grad_norm is not None
        assert not math.isfinite(result.grad_norm)
        assert scheduler.last_epoch == 1, "the scheduler moves only when the optimizer does"
        assert strategy.record(model).skipped_steps == 1
        self.assert_same_weights(weights_of(strategy, model), weights, exact=True)
        self.assert_same_weights(moments_of(strategy, model, optimizer), moments, exact=True)
        following = self.train(strategy, model, optimizer, first=1, scheduler=scheduler)[0]
        assert following.stepped, "the poison is gone with its step"
        assert scheduler.last_epoch == 2

    @on_ranks
    def test_a_gradient_spoilt_after_backward_skips_the_step_too(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        before = weights_of(strategy, model)
        rows = self.rows(strategy.config.train_batch_size)
        strategy.backward(next_token_loss(model, self.share(strategy, rows, 2, 0)), model, optimizer)
        if strategy.rank == 0:
            poison_gradient(model)
        assert strategy.optimizer_step(optimizer, model, None).skipped
        self.assert_same_weights(weights_of(strategy, model), before, exact=True)

    @on_ranks
    def test_frozen_parameters_stay_and_the_others_train(self) -> None:
        def half_frozen() -> nn.Module:
            model = self.model()
            for name, parameter in model.named_parameters():
                if "layers.0" in name or "embed" in name:
                    parameter.requires_grad_(False)
            return model

        strategy, reference = self.strategy(), self.reference()
        model, plain = strategy.prepare(half_frozen()), reference.prepare(half_frozen())
        optimizer, plain_optimizer = strategy.create_optimizer(model), reference.create_optimizer(plain)
        before = weights_of(strategy, model)
        result, expected = self.train(strategy, model, optimizer)[0], self.train(reference, plain, plain_optimizer)[0]
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=self.gradient_tolerance)
        after = weights_of(strategy, model)
        for name in before:
            frozen = "layers.0" in name or "embed" in name
            assert torch.equal(before[name], after[name]) == frozen, name
        self.assert_same_gradients(
            gradients_of(strategy, model, optimizer), gradients_of(reference, plain, plain_optimizer)
        )

    @on_ranks
    def test_tied_embeddings_stay_tied(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model("qwen2_tied"))
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer, steps=2)
        names = [item.name for item in strategy.iter_state(model)]
        assert len([name for name in names if "embed_tokens" in name or "lm_head" in name]) == 1
        inner = strategy.unwrap_model(model)
        assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight  # type: ignore[operator]

    @on_ranks
    def test_weight_decay_spares_biases_and_norms(self) -> None:
        """The loss is zero, so that decay alone moves the weights."""
        strategy = self.strategy(l2=0.5)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        shapes = {item.name: item.weight.ndim for item in strategy.iter_state(model)}
        before = weights_of(strategy, model)
        rows = self.rows(strategy.config.train_batch_size)
        strategy.backward(0.0 * next_token_loss(model, self.share(strategy, rows, 2, 0)), model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped
        after = weights_of(strategy, model)
        for name, ndim in shapes.items():
            factor = 1 - 1e-2 * 0.5 if ndim >= 2 else 1.0
            torch.testing.assert_close(after[name], before[name] * factor, atol=1e-7, rtol=1e-6)

    @on_ranks
    def test_the_scheduler_may_be_none(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        rows = self.rows(strategy.config.train_batch_size)
        strategy.backward(next_token_loss(model, self.share(strategy, rows, 2, 0)), model, optimizer)
        assert strategy.optimizer_step(optimizer, model, None).stepped

    @on_ranks
    def test_a_gradient_is_not_carried_into_the_next_step(self) -> None:
        strategy = self.strategy(actor_learning_rate=0.0)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        rows = self.rows(strategy.config.train_batch_size)
        norms = []
        for _ in range(2):
            strategy.backward(next_token_loss(model, self.share(strategy, rows, 2, 0)), model, optimizer)
            norms.append(strategy.optimizer_step(optimizer, model, None).grad_norm)
        assert norms[0] == norms[1]

    @on_ranks
    def test_gradients_flow_in_sixteen_bit_too(self) -> None:
        strategy = self.strategy(bf16=True)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        first = self.train(strategy, model, optimizer)[0]
        reference = self.reference()
        plain = reference.prepare(self.model())
        expected = self.train(reference, plain, reference.create_optimizer(plain))[0]
        assert first.stepped
        assert first.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)

    @on_ranks
    def test_the_moving_average_follows_the_model(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        average = strategy.prepare_model(self.model())
        optimizer = strategy.create_optimizer(model)
        start = weights_of(strategy, model)
        self.train(strategy, model, optimizer)
        strategy.moving_average(model, average, beta=0.75)
        after, smoothed = weights_of(strategy, model), weights_of(strategy, average)
        for name in start:
            expected = 0.75 * start[name] + 0.25 * after[name]
            torch.testing.assert_close(smoothed[name], expected, atol=1e-6, rtol=1e-6)
        self.assert_same_weights(weights_of(strategy, model), after, exact=True)

    @on_ranks
    def test_the_moving_average_of_a_16_bit_run_keeps_updates_that_16_bit_would_lose(self) -> None:
        strategy = self.strategy(bf16=True)
        model = strategy.prepare(self.model())
        average = strategy.prepare_average(self.model().bfloat16())
        optimizer = strategy.create_optimizer(model)
        start = weights_of(strategy, average)
        self.train(strategy, model, optimizer)
        strategy.moving_average(model, average, beta=0.999)
        after, smoothed = weights_of(strategy, model), weights_of(strategy, average)
        moved = 0.0
        for name in start:
            expected = 0.999 * start[name] + 0.001 * after[name]
            torch.testing.assert_close(smoothed[name], expected, atol=1e-7, rtol=1e-6)
            moved = max(moved, (smoothed[name] - start[name]).abs().max().item())
        assert moved > 5e-6, "an update of a hundredth, a thousandth of it"


def _split(kind: str, total: int, rank: int, world_size: int) -> list[list[int]]:
    """Row numbers of each of this rank's micro-batches; those of all ranks are all rows."""
    mine = list(range(rank * total // world_size, (rank + 1) * total // world_size))
    if kind == "one":
        return [mine]
    if kind == "per row":
        return [[row] for row in mine]
    if kind == "uneven":  # the last rank has more micro-batches than the others
        return [[row] for row in mine] if rank == world_size - 1 else [mine]
    return [list(range(total))[:3], list(range(total))[3:]] if rank == 0 else []


def _token_mean_step(
    strategy: StrategyBase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: torch.Tensor,
    lengths: list[int],
    micro_batches: list[list[int]],
    total: int,
) -> StepResult:
    """One step on the mean over all tokens of all ranks; every rank runs as many micro-batches as the one with the
    most."""
    tokens = sum(length - 1 for length in lengths)
    most = strategy.all_reduce(len(micro_batches), "max") if strategy.distributed else len(micro_batches)
    for index in range(most):
        mine = micro_batches[index] if index < len(micro_batches) else []
        boundary = index == most - 1
        if not mine:  # an empty micro-batch: the forward pass is collective, its share is zero
            loss = next_token_loss(model, rows[:1].to(strategy.device))
            strategy.backward(loss, model, optimizer, scale=0.0, boundary=boundary)
        else:
            count = sum(lengths[row] - 1 for row in mine)
            loss = _masked_loss(model, rows[mine].to(strategy.device), [lengths[row] for row in mine])
            strategy.backward(loss, model, optimizer, scale=count / tokens, boundary=boundary)
    return strategy.optimizer_step(optimizer, model, None)


def _masked_loss(model: nn.Module, rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Mean cross-entropy over the first ``lengths`` tokens of each row."""
    logits = model(input_ids=rows).logits[:, :-1].float()
    targets = rows[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    mask = torch.arange(targets.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None] - 1
    return (losses * mask).sum() / mask.sum()
