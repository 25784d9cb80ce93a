"""A step against its objective written out sample by sample.

A term with the wrong sign, at another temperature, or of other logprobs trains as smoothly as the right one.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.hub_layout import unwrap
from lightrft.strategy.sampling import SamplingParams
from lightrft.trainer.experience import Experience, ExperienceBatch
from lightrft.trainer.kl_controller import FixedKLController
from lightrft.trainer.policy_update import DeviceSums, PolicyUpdater
from lightrft.trainer.prompt_stream import PromptStream

Make = Callable[..., Any]
T, N = 0.7, 4


def stirred(model: Any, seed: int, by: float = 0.03) -> Any:
    """The model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def rolled_out(setup: Any) -> Any:
    """A trainer whose buffer was written by ``.writer``, which is neither the reference nor what is trained now."""
    trainer = setup.trainer
    for model in (trainer.actor, trainer.critic):
        if model is not None:
            stirred(model, 1)
    trainer.strategy.update_engine_weights(trainer.actor)
    trainer.writer, trainer.valued_by = copy.deepcopy(trainer.actor), copy.deepcopy(trainer.critic)
    assert trainer._roll_out(PromptStream(setup.loader, episodes=1, batch_size=4))
    for model in (trainer.actor, trainer.critic):
        if model is not None:
            stirred(model, 2)
    return trainer


def said(model: Any, sample: Experience) -> tuple[Tensor, Tensor]:
    """Logprobs ``[R]`` of a response, and the entropies of what its tokens were drawn from."""
    logits = unwrap(model).model(sample.tokens[None]).logits[0, -sample.response_length - 1 : -1].double() / T
    each = logits.log_softmax(-1)
    drawn = sample.tokens[-sample.response_length :]
    return each.gather(-1, drawn[:, None])[:, 0], -(each.exp() * each).sum(-1)


def values_of(model: Any, sample: Experience) -> Tensor:
    """``[R]``: what a critic expects before each token of a response."""
    hidden = model.model(sample.tokens[None]).last_hidden_state[0, -sample.response_length - 1 : -1]
    return model.value_head(hidden)[:, 0].double()


def gradient_of_step(trainer: Any, model: Any, optimizer: Any) -> tuple[list[Tensor], list[Experience], dict[str, Any]]:
    """Take the first optimizer step of the buffer: the gradient of ``model``, the samples, and the figures."""
    batch = trainer._plan_epoch(0, 0)[0]
    found: list[Tensor] = []
    hook = optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in model.parameters()))
    before = copy.deepcopy(model.state_dict())
    figures = trainer.training_step(batch, 0)
    hook.remove()
    model.load_state_dict(before)
    return found, [trainer.replay_buffer.samples[index] for index in batch.indices], figures


def assert_same_gradient(found: Sequence[Tensor], loss: Tensor, model: Any) -> None:
    expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    whole = torch.cat([part.flatten() for part in expected])
    assert (torch.cat([part.flatten() for part in found]) - whole).norm() < 1e-4 * whole.norm()


KL: dict[str, Callable[[Tensor], Tensor]] = {  # of the log of reference / policy
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: log_ratio.exp() - 1 - log_ratio,
}


@pytest.mark.parametrize(
    ("weighing", "estimator", "share"), [("token-mean", "k2", 0.0), ("seq-mean-token-mean", "k3", 0.7)]
)
def test_the_actor_follows_the_objective_written_out(make: Make, weighing: str, estimator: str, share: float) -> None:
    low, high, kl_coef, bonus, cap = 0.1, 0.25, 0.5, 0.05, 1.2
    setup = make(
        temperature=T,
        max_epochs=2,
        train_batch_size=16,
        max_norm=0.0,
        eps_clip=low,
        eps_clip_high=high,
        loss_agg_mode=weighing,
        init_kl_coef=kl_coef,
        use_kl_loss=True,
        kl_estimator=estimator,
        entropy_coef=bonus,
        importance_sampling_cap=cap,
        high_entropy_token_ratio=share,
    )
    trainer = rolled_out(setup)
    for sample in trainer.replay_buffer.items:  # an engine that drifts
        noise = torch.randn(sample.response_length, generator=torch.Generator().manual_seed(sample.index))
        sample.engine_logprobs += 0.3 * noise
    found, samples, figures = gradient_of_step(trainer, trainer.actor, trainer.actor_optim)

    old = [tuple(part.detach() for part in said(trainer.writer, sample)) for sample in samples]
    ranked = torch.cat([entropies for _, entropies in old]).sort(descending=True).values
    threshold = ranked[round(share * len(ranked)) - 1] - 1e-6  # the last of all where no share is asked for
    losses, cuts = [], []
    measured: dict[str, list[Tensor]] = collections.defaultdict(list)
    for sample, (before, entropies) in zip(samples, old, strict=True):
        logprobs, uncertain = said(trainer.actor, sample)
        reference = said(trainer.initial_model, sample)[0].detach()
        weights = (before - sample.engine_logprobs).exp().clamp(max=cap)
        ratio, advantages = (logprobs - before).exp(), sample.advantages
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        kl, trained = KL[estimator](reference - logprobs), entropies >= threshold
        # arXiv:2506.01939 leaves out policy gradients; the reference still holds every token.
        losses.append((-weights * surrogate - bonus * uncertain).where(trained, 0.0) + kl_coef * kl)
        cuts.append(torch.stack([(ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)]))
        for name, figure in {
            "kl": kl,
            "policy_kl": ratio - 1 - (logprobs - before),
            "entropy": uncertain,
            "clip_fraction": (trained & cuts[-1].any(dim=0)).double(),
            "importance_weight": weights,
            "logprob_drift": (before - sample.engine_logprobs).abs(),
        }.items():
            measured[name].append(figure.detach())
    assert torch.cat(cuts, dim=1).any(dim=1).all(), "both ends of the range are in use"
    means = torch.stack([each.mean() if len(each) else each.sum() for each in losses])
    loss = torch.cat(losses).mean() if weighing == "token-mean" else means.mean()
    assert_same_gradient(found, loss, trainer.actor)
    expected = {name: torch.cat(values).mean().item() for name, values in measured.items()}
    expected |= {"loss": loss.item(), "grad_norm": torch.cat([part.flatten() for part in found]).norm().item()}
    expected |= {"logprob_drift_max": torch.cat(measured["logprob_drift"]).max().item(), "skipped": 0.0}
    assert figures == pytest.approx(expected, rel=1e-3)


def test_nothing_is_dropped_out_of_the_policy_that_wrote_the_samples(make: Make) -> None:
    adapters = {"lora_rank": 2, "lora_dropout": 0.5}
    trainer = rolled_out(make(temperature=T, max_epochs=2, model_options=adapters))
    assert trainer.actor.training
    for sample in trainer.replay_buffer.items:
        assert torch.allclose(sample.old_logprobs.double(), said(trainer.writer.eval(), sample)[0], atol=1e-4)


def test_the_critic_follows_its_objective_written_out(make: Make) -> None:
    clip = 0.02
    trainer = rolled_out(make(advantage_estimator="gae", value_clip=clip, max_norm=0.0))
    found, samples, _ = gradient_of_step(trainer, trainer.critic, trainer.critic_optim)
    losses = []
    for sample in samples:
        values, before = values_of(trainer.critic, sample), values_of(trainer.valued_by, sample).detach()
        near = before + (values - before).clamp(-clip, clip)
        losses.append(torch.maximum((values - sample.returns) ** 2, (near - sample.returns) ** 2) / 2)
    assert_same_gradient(found, torch.cat(losses).mean(), trainer.critic)


# Estimator, and whether rewards and advantages are whitened and clipped.
@pytest.mark.parametrize(("estimator", "whitened"), [("dr_grpo", False), ("gae", True)])
def test_advantages_are_what_rewards_and_kl_make_them(make: Make, estimator: str, whitened: bool) -> None:
    gamma, lambd, kl_coef, penalty, limit = 0.9, 0.8, 0.2, 0.5, 1.5
    trainer = rolled_out(
        make(
            temperature=T,
            advantage_estimator=estimator,
            gamma=gamma,
            lambd=lambd,
            init_kl_coef=kl_coef,
            kl_estimator="k1",
            overlong_buffer=True,
            overlong_buffer_len=2,
            overlong_buffer_penalty_factor=penalty,
            reward_running_norm=whitened,
            reward_running_norm_minus_mean=whitened,
            reward_clip=1.0 if whitened else 0.0,
            advantages_norm=whitened,
            advantage_clip=limit if whitened else 0.0,
        )
    )
    samples = trainer.replay_buffer.items
    tokenizer, responses = trainer.tokenizer, [sample.tokens[-sample.response_length :] for sample in samples]
    assert [sample.finished for sample in samples] == [int(ids[-1]) == tokenizer.eos_token_id for ids in responses]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    rewards = [sum(c in "02468" for c in text) / max(1, len(text)) for text in texts]
    assert [sample.reward for sample in samples] == pytest.approx(rewards)
    # Of 4 tokens at most, those after the second begin to cost.
    shaped = torch.tensor([r - penalty * max(0, len(ids) - 2) / 2 for r, ids in zip(rewards, responses, strict=True)])
    if whitened:
        shaped = ((shaped - shaped.mean()) / shaped.std()).clamp(-1.0, 1.0)
        assert shaped.max() == 1.0
    advantages, returns = [], []
    for place, sample in enumerate(samples):
        group = shaped[place // N * N : place // N * N + N]
        score = shaped[place] - (group.mean() if estimator == "dr_grpo" else 0.0)
        kl = said(trainer.writer, sample)[0] - said(trainer.initial_model, sample)[0]
        ahead, following = torch.zeros(2).double()
        values = values_of(trainer.valued_by, sample) if estimator == "gae" else torch.zeros(len(kl))
        decay = gamma * (lambd if estimator == "gae" else 1.0)
        mine: list[Tensor] = []
        for t in reversed(range(len(kl))):
            reward = (score if t == len(kl) - 1 else 0.0) - kl_coef * kl[t]
            ahead = reward + gamma * following - values[t] + decay * ahead
            following = values[t]
            mine.append(ahead.detach())
        advantages.append(torch.stack(mine[::-1]))
        returns.append(advantages[-1] + values.detach())
    if whitened:
        everything = torch.cat(advantages)
        mean, std = everything.mean(), everything.std(unbiased=False)
        advantages = [((each - mean) / std).clamp(-limit, limit) for each in advantages]
        assert max(float(each.max()) for each in advantages) == limit
    for sample, expected, target in zip(samples, advantages, returns, strict=True):
        assert torch.allclose(sample.advantages.double(), expected, atol=1e-4)
        if estimator == "gae":
            assert torch.allclose(sample.returns.double(), target, atol=1e-4)


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
    loss = updater(lambda *_, **__: logprobs, objective, **settings).actor_loss(rows, 0.5, DeviceSums())

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
