from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.trainer.losses import (
    aggregate,
    entropy_threshold,
    loss_denominator,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def case(rows: int = 5, length: int = 7, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    old = logprobs + 0.6 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, length, (rows,), generator=generator)
    mask = torch.arange(length) >= length - lengths[:, None]
    return logprobs, old, advantages, mask


def plain_mean(token_losses: torch.Tensor, mask: torch.Tensor, mode: str) -> float:
    rows = [
        [float(x) for x, m in zip(row, kept, strict=True) if m] for row, kept in zip(token_losses, mask, strict=True)
    ]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows)


def test_ppo_is_the_papers_minimum_token_by_token() -> None:
    logprobs, old, advantages, mask = case()
    loss = policy_loss(logprobs, old, advantages, mask, eps_low=0.2, eps_high=0.3)
    clips = 0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t] - old[b, t])
        a = float(advantages[b, t])
        expected = -min(ratio * a, min(max(ratio, 0.8), 1.3) * a)
        assert float(loss.token_losses[b, t]) == pytest.approx(expected, rel=1e-12)
        cut = (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8)
        assert bool(loss.clipped[b, t]) == cut
        clips += cut
    assert clips > 0
    assert not loss.clipped[~mask].any()


def test_clipped_tokens_have_no_gradient() -> None:
    logprobs, old, advantages, mask = case()
    logprobs.requires_grad_()
    loss = policy_loss(logprobs, old, advantages, mask)
    aggregate(loss.token_losses, mask, "token-mean").backward()
    assert logprobs.grad is not None
    assert (logprobs.grad[loss.clipped] == 0).all()
    assert (logprobs.grad[~mask] == 0).all()
    assert (logprobs.grad[mask & ~loss.clipped] != 0).all()


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logprobs, _, advantages, mask = case()
    logprobs.requires_grad_()
    for objective in ("ppo", "cpgd"):
        (grad,) = torch.autograd.grad(
            aggregate(
                policy_loss(logprobs, logprobs.detach(), advantages, mask, objective=objective).token_losses,
                mask,
                "token-mean",
            ),
            logprobs,
        )
        assert torch.allclose(grad, -advantages * mask)


def test_gspo_clips_the_sequence_ratio_and_spreads_its_gradient() -> None:
    logprobs, old, advantages, mask = case()
    advantages = advantages[:, :1].expand_as(advantages)
    logprobs.requires_grad_()
    loss = aggregate(
        policy_loss(logprobs, old, advantages, mask, objective="gspo", eps_low=0.1, eps_high=0.15).token_losses,
        mask,
        "seq-mean-token-mean",
    )
    lengths = mask.sum(1)
    s = ((logprobs - old) * mask).sum(1).div(lengths).exp()
    a = advantages[:, 0]
    expected = -torch.minimum(s * a, s.clamp(0.9, 1.15) * a).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    mine, theirs = (torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(mine, theirs)


def plain_cpgd(
    logp: float, old: float, a: float, low: float, high: float, drift_coef: float, drift_clip: float
) -> tuple[float, float]:
    """One token's loss and its derivative by logp, written out with the math module in float64."""
    log_ratio = logp - old
    ratio = math.exp(log_ratio)
    cut = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
    bounded = min(max(log_ratio, math.log(1 - low)), math.log(1 + high))
    gain, gain_slope = (bounded * a, 0.0) if cut else (log_ratio * a, a)
    drift, drift_slope = ratio - 1 - log_ratio, min(ratio - 1, drift_clip)
    return -(gain - drift_coef * drift), -(gain_slope - drift_coef * drift_slope)


@pytest.mark.parametrize("drift_coef", [0.0, 0.3])
@pytest.mark.parametrize("drift_clip", [0.1, 2.0])
def test_cpgd_is_a_clipped_log_ratio_with_a_drift_of_bounded_slope(drift_coef: float, drift_clip: float) -> None:
    logprobs, old, advantages, mask = case(rows=12)
    logprobs.requires_grad_()
    loss = policy_loss(
        *(logprobs, old, advantages, mask),
        objective="cpgd",
        eps_low=0.2,
        eps_high=0.3,
        drift_coef=drift_coef,
        drift_clip=drift_clip,
    )
    (gradient,) = torch.autograd.grad(aggregate(loss.token_losses, mask, "token-mean"), logprobs)
    for b, t in mask.nonzero().tolist():
        token = (float(logprobs[b, t].detach()), float(old[b, t]), float(advantages[b, t]))
        value, slope = plain_cpgd(*token, 0.2, 0.3, drift_coef, drift_clip)
        assert float(loss.token_losses[b, t].detach()) == pytest.approx(value, rel=1e-12, abs=1e-14)
        assert float(gradient[b, t]) == pytest.approx(slope, rel=1e-12, abs=1e-14)
    assert (gradient[~mask] == 0).all()
    assert loss.clipped.any()


def test_cpgd_trains_where_rewards_differ() -> None:
    """The existing implementation's CPGD advantages are identically 0, so that nothing is learned."""
    from lightrft.trainer.advantages import discounted_returns, group_scores, token_rewards

    scores = group_scores(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), "dr_grpo").flatten()
    mask = torch.ones(4, 3, dtype=torch.bool)
    advantages = discounted_returns(token_rewards(scores, mask), mask, 1.0)
    logprobs = torch.full((4, 3), -1.0, requires_grad=True)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, objective="cpgd", drift_coef=0.1)
    aggregate(loss.token_losses, mask, "token-mean").backward()
    assert logprobs.grad is not None
    assert (logprobs.grad.abs() == 0.5).all()


def test_cpgd_drift_pulls_back_with_bounded_force() -> None:
    old = torch.zeros(1, 3, dtype=torch.float64)
    logprobs = torch.tensor([[-1.0, 0.1, 15.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = policy_loss(logprobs, old, torch.zeros(1, 3, dtype=torch.float64), mask, objective="cpgd", drift_coef=1.0)
    ratio = logprobs.detach().exp()
    assert torch.allclose(loss.token_losses.detach(), ratio - 1 - logprobs.detach())
    loss.token_losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([math.exp(-1) - 1, math.exp(0.1) - 1, 0.2])


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_is_the_mean_that_its_name_says(mode: str) -> None:
    losses, _, _, mask = case()
    whole = aggregate(losses, mask, mode) / loss_denominator(mode, int(mask.sum()), len(mask))
    assert whole.item() == pytest.approx(plain_mean(losses, mask, mode), rel=1e-12)


@given(st.sampled_from(MODES), st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_gradient_does_not_depend_on_the_micro_batch_split(mode: str, seed: int, cuts: list[int]) -> None:
    logprobs, old, advantages, mask = case(rows=12, seed=seed)
    logprobs.requires_grad_()
    denominator = loss_denominator(mode, int(mask.sum()), len(mask))

    def gradient(sizes: list[int]) -> torch.Tensor:
        parts = [tensor.split(sizes) for tensor in (logprobs, old, advantages, mask)]
        total = sum(
            aggregate(policy_loss(*part).token_losses, part[3], mode) / denominator for part in zip(*parts, strict=True)
        )
        return torch.autograd.grad(total, logprobs)[0]

    sizes = [*cuts[:-1]] if sum(cuts) > 12 else cuts
    while sum(sizes) > 12:
        sizes = sizes[:-1]
    sizes = [*sizes, 12 - sum(sizes)] if sum(sizes) < 12 else sizes
    assert torch.allclose(gradient(sizes), gradient([12]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_train_on_is_zero_not_nan(mode: str) -> None:
    logprobs = torch.randn(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = aggregate(policy_loss(logprobs, logprobs.detach(), torch.zeros(2, 3), mask).token_losses, mask, mode)
    (loss / loss_denominator(mode, 0, 0)).backward()
    assert loss.item() == 0
    assert (logprobs.grad == 0).all()


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cpgd"])
def test_what_padding_holds_does_not_matter(objective: str) -> None:
    logprobs, old, advantages, mask = case()
    junk = torch.where(mask, 0.0, float("nan")).double()
    noisy = (logprobs + junk).requires_grad_()
    loss = policy_loss(noisy, old, torch.where(mask, advantages, 0.0), mask, objective=objective, drift_coef=0.1)
    total = aggregate(loss.token_losses, mask, "token-mean")
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(noisy.grad).all()


def test_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    values, old, returns = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.0, 2.0))
    assert value_loss(values, old, returns, None).item() == 0.5
    assert value_loss(values, old, returns, 0.2).item() == pytest.approx((0.2 - 2.0) ** 2 / 2)
    assert value_loss(values, old, torch.tensor([-1.0]), 0.2).item() == pytest.approx(4 / 2)


def test_importance_weights_are_cut_from_above_and_carry_no_gradient() -> None:
    trainer = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    weights = truncated_importance_weights(trainer, torch.tensor([[-1.0, -3.0, -0.5]]), 2.0)
    assert weights[0].tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])
    assert not weights.requires_grad


def test_importance_weights_scale_the_gradient() -> None:
    logprobs, _, advantages, mask = case()
    logprobs.requires_grad_()
    weights = torch.rand_like(logprobs)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, weights=weights)
    loss.token_losses.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages * weights * mask)


def test_entropy_threshold_keeps_the_asked_share() -> None:
    entropies = torch.arange(10.0)
    assert entropy_threshold(entropies, 0.2) == 8.0
    assert entropy_threshold(entropies, 1.0) == -math.inf
    assert entropy_threshold(entropies, 0.01) == 9.0
    assert entropy_threshold(torch.zeros(0), 0.2) == -math.inf
