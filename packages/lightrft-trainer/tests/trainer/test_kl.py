from __future__ import annotations

import math

import pytest
import torch

from lightrft.strategy.config import StrategyConfig
from lightrft.trainer.kl import KLEstimator, approximate_kl
from lightrft.trainer.kl_controller import AdaptiveKLController, FixedKLController, make_kl_controller


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    q = (p + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    return p, q


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    p, q = distributions()
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * approximate_kl(p, q, estimator)).sum() == pytest.approx(exact.item(), rel=1e-12)


def test_k2_is_close_and_k3_is_never_negative() -> None:
    p, q = distributions()
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * approximate_kl(p, q, "k2")).sum().item() == pytest.approx(exact, rel=0.3)
    assert (approximate_kl(p, q, "k3") >= 0).all()


def expected_gradient(estimator: str) -> torch.Tensor:
    """The mean over samples of the estimator's gradient, samples held fixed."""
    p, q = distributions()
    logits = p.clone().requires_grad_()
    logp = logits.log_softmax(0)
    (p.exp() * approximate_kl(logp, q, estimator)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_gradients_in_a_loss_are_what_the_docstring_says() -> None:
    p, q = distributions()
    logits = p.clone().requires_grad_()
    logp = logits.log_softmax(0)
    (logp.exp() * (logp - q)).sum().backward()
    assert torch.allclose(expected_gradient("k2"), logits.grad)
    assert expected_gradient("k1").abs().max() < 1e-12
    reverse = p.clone().requires_grad_()
    (q.exp() * (q - reverse.log_softmax(0))).sum().backward()
    assert torch.allclose(expected_gradient("k3"), reverse.grad)


@pytest.mark.parametrize(
    ("estimator", "low", "high"), [("k1", 1 - 1e-9, 1 + 1e-9), ("k2", -0.2, 0.2), ("k3", -0.2, 0.2)]
)
def test_in_a_reward_k1_alone_pulls_toward_the_reference(estimator: KLEstimator, low: float, high: float) -> None:
    """How much of the KL's own gradient a policy gradient has whose penalty is the estimate."""
    p, q = distributions()
    gradients = []
    for penalty in (approximate_kl(p, q, estimator), None):
        logits = p.clone().requires_grad_()
        logp = logits.log_softmax(0)
        (logp.exp() * (logp - q) if penalty is None else p.exp() * logp * penalty).sum().backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
    followed, exact = gradients
    assert low < followed @ exact / (exact @ exact) < high


def test_by_default_the_estimator_is_the_one_for_where_the_kl_is_added() -> None:
    assert StrategyConfig().kl_estimator_name == "k1"
    assert StrategyConfig(use_kl_loss=True).kl_estimator_name == "k3"
    assert StrategyConfig(kl_estimator="k2").kl_estimator_name == "k2"


def test_k3_stays_finite_for_an_impossible_token_and_never_leads_away_from_the_reference() -> None:
    logprobs = torch.tensor([-300.0, -22.0, -3.0, -0.0], requires_grad=True)
    value = approximate_kl(logprobs, torch.tensor([0.0, -1.0, -1.0, -40.0]), "k3")
    assert torch.isfinite(value).all()
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert (gradient[:2] <= 0).all()
    assert gradient[2:].tolist() == pytest.approx([1 - math.exp(2), 1.0])


def test_unknown_estimator_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3"):
        approximate_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_weight_rises_above_the_target_and_falls_below() -> None:
    controller = AdaptiveKLController(0.1, target=0.05, horizon=100)
    controller.update(0.5, 10)
    assert controller.value == pytest.approx(0.1 * (1 + 0.2 * 0.1), rel=1e-3)
    controller.update(0.0, 10)
    assert controller.value == pytest.approx(0.1)
    before = controller.value
    controller.update(float("nan"), 10)
    assert controller.value == before


def test_a_step_of_more_samples_than_the_horizon_never_turns_the_penalty_into_a_reward() -> None:
    controller = AdaptiveKLController(0.1, target=0.05, horizon=100)
    controller.update(0.0, 1000)
    assert 0 < controller.value < 0.1


def test_controllers_come_back_from_json() -> None:
    import json

    controller = make_kl_controller(0.1, 0.05, 100)
    controller.update(0.07, 3)
    other = make_kl_controller(0.9, 0.05, 100)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.value == controller.value
    fixed = make_kl_controller(0.9, None, 100)
    assert type(fixed) is FixedKLController
    fixed.load_state_dict(controller.state_dict())
    assert fixed.value == 0.9
