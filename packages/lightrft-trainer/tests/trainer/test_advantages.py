from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.trainer.advantages import STD_EPS, discounted_returns, gae, group_scores, token_rewards, whiten


def rewards(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_grpo_is_the_papers_equation_in_float64() -> None:
    row = [0.0, 1.0, 1.0, 3.0]
    mean = sum(row) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
    expected = [(r - mean) / (std + STD_EPS) for r in row]
    for name in ("grpo", "group_norm"):
        assert group_scores(rewards(row), name)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    row = [0.0, 1.0, 5.0]
    assert group_scores(rewards(row), "rloo")[0].tolist() == pytest.approx([0 - 3.0, 1 - 2.5, 5 - 0.5])


def test_dr_grpo_only_centres() -> None:
    assert group_scores(rewards([0.0, 1.0, 5.0]), "dr_grpo")[0].tolist() == pytest.approx([-2.0, -1.0, 3.0])


def test_reinforce_baseline_is_whitened_over_the_batch_of_group_centred_rewards() -> None:
    scores = group_scores(rewards([0.0, 1.0], [5.0, 9.0]), "reinforce_baseline")
    std = math.sqrt((0.25 + 0.25 + 4 + 4) / 4)
    assert scores.flatten().tolist() == pytest.approx([-0.5 / std, 0.5 / std, -2 / std, 2 / std], rel=1e-5)


def test_reinforce_baseline_of_single_samples_uses_the_batch_mean() -> None:
    scores = group_scores(rewards([0.0], [2.0]), "reinforce_baseline")
    assert scores.flatten().tolist() == pytest.approx([-1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("name", ["group_norm", "dr_grpo", "rloo", "reinforce_baseline"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -3.3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_variance_scores_exactly_zero(name: str, value: float, dtype: torch.dtype) -> None:
    scores = group_scores(torch.full((3, 7), value, dtype=dtype), name)
    assert scores.tolist() == [[0.0] * 7] * 3


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_group_scores_are_finite_and_centred(rows: list[list[float]]) -> None:
    for name in ("group_norm", "dr_grpo", "rloo"):
        scores = group_scores(torch.tensor(rows, dtype=torch.float64), name)
        assert torch.isfinite(scores).all()
        assert scores.sum(dim=1).abs().max() < 1e-5


def test_batch_statistics_are_those_of_all_ranks() -> None:
    whole = rewards([0.0, 1.0], [5.0, 9.0], [2.0, 2.5])
    together = group_scores(whole, "reinforce_baseline")
    other = whole[2:] - whole[2:].mean()
    outside = iter(
        [torch.tensor([other.sum(), 2.0]), torch.tensor([((whole - whole.mean(1, keepdim=True))[2:] ** 2).sum()])]
    )
    parts = group_scores(whole[:2], "reinforce_baseline", sum_over_ranks=lambda vector: vector + next(outside))
    assert torch.allclose(parts, together[:2])


def test_group_estimators_refuse_single_samples() -> None:
    with pytest.raises(ValueError, match="at least 2, not 1"):
        group_scores(rewards([1.0]), "rloo")


def test_gamma_discounts_every_row_not_only_the_first() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    spread = token_rewards(torch.tensor([1.0, 2.0, 4.0]), mask)
    returns = discounted_returns(spread, mask, 0.5)
    assert returns.tolist() == [[0, 0.25, 0.5, 1.0, 0], [1.0, 2.0, 0, 0, 0], [0, 0, 1.0, 2.0, 4.0]]


def test_gamma_one_agrees_with_the_recursion() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    values = torch.randn(2, 5, dtype=torch.float64)
    assert torch.allclose(discounted_returns(values, mask, 1.0), discounted_returns(values, mask, 1.0 - 1e-15))


def test_rewards_stand_on_the_last_token_and_kl_on_every_one() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    kl = torch.full((2, 4), 2.0)
    spread = token_rewards(torch.tensor([1.0, 9.0]), mask, kl, 0.1)
    assert torch.allclose(spread, torch.tensor([[0, -0.2, 0.8, 0], [0, 0, 0, 0]]))


def test_gae_is_the_sum_of_discounted_deltas() -> None:
    gamma, lambd = 0.9, 0.8
    reward, value = [0.0, 0.0, 1.0], [0.3, -0.2, 0.5]
    deltas = [reward[t] + gamma * (value[t + 1] if t < 2 else 0.0) - value[t] for t in range(3)]
    expected = [sum((gamma * lambd) ** (u - t) * deltas[u] for u in range(t, 3)) for t in range(3)]
    mask = torch.tensor([[0, 1, 1, 1, 0]], dtype=torch.bool)
    junk = 99.0  # outside the mask
    advantages, returns = gae(
        torch.tensor([[0, *reward, 0]], dtype=torch.float64),
        torch.tensor([[junk, *value, junk]], dtype=torch.float64),
        mask,
        gamma,
        lambd,
    )
    assert advantages[0].tolist() == pytest.approx([0, *expected, 0])
    assert returns[0, 1:4].tolist() == pytest.approx([a + v for a, v in zip(expected, value, strict=True)])


def test_whitened_advantages_have_mean_zero_and_variance_one() -> None:
    mask = torch.rand(4, 9) < 0.7
    white = whiten(torch.randn(4, 9, dtype=torch.float64) * 3 + 5, mask)
    assert white[mask].mean().abs() < 1e-9
    assert white[mask].var(unbiased=False) == pytest.approx(1.0, rel=1e-6)
    assert (white[~mask] == 0).all()


def test_whitening_equal_values_gives_zero() -> None:
    assert (whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)).abs() < 1e-6).all()
