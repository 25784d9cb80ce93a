from __future__ import annotations

from typing import Any

import pytest
import torch

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.sampling import SamplingParams
from lightrft.trainer.experience import ExperienceBatch
from lightrft.trainer.kl_controller import FixedKLController
from lightrft.trainer.policy_update import DeviceSums, PolicyUpdater


def updater(actor: Any, objective: Any, **settings: Any) -> PolicyUpdater:
    strategy = FakeStrategy(**settings)
    nothing: Any = None
    return PolicyUpdater(
        strategy=strategy,
        actor=actor,
        actor_optim=nothing,
        actor_scheduler=None,
        critic=None,
        critic_optim=None,
        critic_scheduler=None,
        ema_model=None,
        ema_beta=0.9,
        pad_token_id=0,
        objective=objective,
        loss_agg_mode=strategy.config.loss_agg_mode,
        eps_clip=0.2,
        value_clip=0.2,
        kl_controller=FixedKLController(strategy.config.init_kl_coef),
        sampling=SamplingParams(),
    )


@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_low_entropy_leaves_the_policy_loss_and_neither_the_kl_nor_a_sequence_s_ratio(objective: str) -> None:
    """arXiv:2506.01939 leaves out policy gradients; the reference still holds every token."""
    generator = torch.Generator().manual_seed(0)

    def figures() -> torch.Tensor:
        return torch.rand(3, 8, generator=generator, dtype=torch.float64)

    mask = torch.arange(8) >= torch.tensor([[2], [5], [1]])
    fields = {name: -figures() * mask for name in ("old_logprobs", "reference_logprobs")}
    fields |= {"advantages": (figures() - 0.5) * mask, "entropies": figures() * mask}
    logprobs = ((fields["old_logprobs"] + 0.6 * (figures() - 0.5)) * mask).requires_grad_()
    rows = ExperienceBatch(torch.zeros(3, 8, dtype=torch.long), mask.long(), mask, fields, {})
    settings = {"init_kl_coef": 0.1, "use_kl_loss": True, "high_entropy_token_ratio": 0.5}
    loss = updater(lambda *_, **__: logprobs, objective, **settings)._actor_loss(rows, 0.5, DeviceSums())

    log_ratio = logprobs - fields["old_logprobs"]
    if objective == "gspo":
        means = [(row * held).sum() / held.sum() for row, held in zip(log_ratio.detach(), mask, strict=True)]
        log_ratio = torch.stack(means)[:, None] + log_ratio - log_ratio.detach()
    ratio, advantages = log_ratio.exp(), fields["advantages"]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    apart = fields["reference_logprobs"] - logprobs
    expected = -surrogate[mask & (fields["entropies"] >= 0.5)].sum() + 0.1 * (apart.exp() - 1 - apart)[mask].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (one,), (other,) = torch.autograd.grad(loss, [logprobs]), torch.autograd.grad(expected, [logprobs])
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
