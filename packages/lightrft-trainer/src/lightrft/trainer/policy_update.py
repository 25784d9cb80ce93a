"""One optimizer step: forward and backward over micro-batches, the losses of actor and critic, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .experience import ExperienceBatch, make_batch
from .forward import token_statistics, token_values
from .kl import approximate_kl
from .kl_controller import FixedKLController
from .losses import (
    AggregationMode,
    PolicyObjective,
    aggregate,
    entropy_threshold,
    loss_denominator,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)
from .replay_buffer import OptimizerBatch, ReplayBuffer

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase
    from lightrft.strategy.sampling import SamplingParams


@dataclass(kw_only=True, eq=False, repr=False)
class PolicyUpdater:
    """Takes optimizer steps on batches of a replay buffer.

    :param sampling: how the samples were drawn.
    """

    strategy: StrategyBase
    actor: nn.Module
    actor_optim: Optimizer
    actor_scheduler: Any
    critic: nn.Module | None
    critic_optim: Optimizer | None
    critic_scheduler: Any
    ema_model: nn.Module | None
    ema_beta: float
    pad_token_id: int
    objective: PolicyObjective
    loss_agg_mode: AggregationMode
    eps_clip: float
    value_clip: float
    kl_controller: FixedKLController
    sampling: SamplingParams

    def __post_init__(self) -> None:
        self.config = self.strategy.config

    def step(
        self, batch: OptimizerBatch, buffer: ReplayBuffer, token_fields: Sequence[str], *, train_actor: bool = True
    ) -> dict[str, float]:
        """One optimizer step. A collective; all ranks run the same number of micro-batches, some of them empty.

        :param token_fields: per-token values that every sample has, on every rank.
        :return: loss and means over all tokens of all ranks, gradient norms, and whether the step was skipped.
        """
        threshold = self._entropy_threshold(batch, buffer)
        denominator = loss_denominator(self.loss_agg_mode, batch.tokens, batch.sequences)
        sums = DeviceSums()
        last = len(batch.microbatches) - 1
        for i, micro in enumerate(batch.microbatches):
            samples = [buffer.samples[index] for index in micro.indices]
            rows = make_batch(samples, self.pad_token_id, self.strategy.device, token_fields)
            if train_actor:
                loss = self.actor_loss(rows, threshold, sums)
                self.strategy.backward(loss, self.actor, self.actor_optim, scale=1.0 / denominator, boundary=i == last)
            if self.critic is not None and self.critic_optim is not None:
                loss = self.critic_loss(rows, sums)
                share = 1.0 / max(1, batch.tokens)
                self.strategy.backward(loss, self.critic, self.critic_optim, scale=share, boundary=i == last)
        figures = self._step_optimizers(train_actor)
        tokens = max(1, batch.tokens)
        for name, value in sums.over_ranks(self.strategy).items():
            peak = name.endswith("_max")
            figures[name] = value if peak else value / (denominator if name == "loss" else tokens)
        return figures

    def actor_loss(self, rows: ExperienceBatch, threshold: float | None, sums: DeviceSums) -> Tensor:
        """Sum over the micro-batch; divided by the global count later.

        :param rows: of samples; figures of each token ``[B, T]``, of which ``rows.mask`` are the response's.
        :param threshold: with ``--high_entropy_token_ratio``: the entropy from which tokens are trained on.
        :param sums: of what the metrics are to show, "loss" at least.
        """
        config, fields, mask = self.config, rows.per_token, rows.mask
        statistics = token_statistics(self.actor, rows, self.sampling.temperature, entropy=config.entropy_coef > 0)
        logprobs = statistics.logprobs
        # With a single optimizer step per rollout the weights are still those that generated it: the ratio is 1.
        old = fields.get("old_logprobs", logprobs.detach())
        policy = policy_loss(
            logprobs,
            old,
            fields["advantages"],
            mask,
            objective=self.objective,
            eps_low=self.eps_clip,
            eps_high=self.eps_clip if config.eps_clip_high is None else config.eps_clip_high,
            weights=self._engine_weights(old, fields, mask, sums),
            drift_coef=config.policy_drift_coef,
            drift_clip=config.policy_drift_clip_eps,
        )
        token_losses, chosen = policy.token_losses, mask
        if statistics.entropies is not None:
            sums.add("entropy", statistics.entropies, mask)
            token_losses = token_losses - config.entropy_coef * statistics.entropies
        if threshold is not None:  # the others give no gradient but the KL's, and count in the mean all the same
            chosen = mask & (fields["entropies"] >= threshold)
            token_losses = token_losses.masked_fill(~chosen, 0.0)
        sums.add("clip_fraction", policy.clipped.float(), chosen)
        sums.add("policy_kl", approximate_kl(old, logprobs.detach(), "k3"), mask)
        if "reference_logprobs" in fields:
            kl = approximate_kl(logprobs, fields["reference_logprobs"], config.kl_estimator_name)
            sums.add("kl", kl, mask)
            if config.use_kl_loss:
                token_losses = token_losses + self.kl_controller.value * kl
        loss = aggregate(token_losses, mask, self.loss_agg_mode)
        sums.add("loss", loss)
        return loss

    def _engine_weights(self, old: Tensor, fields: dict[str, Tensor], mask: Tensor, sums: DeviceSums) -> Tensor | None:
        """Measure how far the engine is from the trainer, and correct for it where asked."""
        if not self.sampling.full_support or "engine_logprobs" not in fields:
            return None  # logprobs of another distribution: their difference is no drift
        drift = (old.detach() - fields["engine_logprobs"]).abs().masked_fill(~mask, 0.0)
        sums.add("logprob_drift", drift, mask)
        sums.maximum("logprob_drift_max", drift.max())
        cap = self.config.importance_sampling_cap
        if cap <= 0:
            return None
        weights = truncated_importance_weights(old, fields["engine_logprobs"], cap)
        sums.add("importance_weight", weights, mask)
        return weights

    def critic_loss(self, rows: ExperienceBatch, sums: DeviceSums) -> Tensor:
        """Sum over the micro-batch, as that of the actor; divided by the tokens."""
        assert self.critic is not None
        fields, mask = rows.per_token, rows.mask
        values = token_values(self.critic, rows)
        loss = aggregate(value_loss(values, fields["values"], fields["returns"], self.value_clip), mask, "token-mean")
        sums.add("critic_loss", loss)
        sums.add("values", values, mask)
        return loss

    def _step_optimizers(self, train_actor: bool) -> dict[str, float]:
        strategy, figures = self.strategy, {}
        if train_actor:
            result = strategy.optimizer_step(self.actor_optim, self.actor, self.actor_scheduler, name="actor")
            figures |= {"grad_norm": result.grad_norm or 0.0, "skipped": float(result.skipped)}
            if result.stepped and self.ema_model is not None:
                strategy.moving_average(self.actor, self.ema_model, self.ema_beta)
        if self.critic is not None and self.critic_optim is not None:
            result = strategy.optimizer_step(self.critic_optim, self.critic, self.critic_scheduler, name="critic")
            figures["critic_grad_norm"] = result.grad_norm or 0.0
        return figures

    # ---- high-entropy tokens ----------------------------------------------------------------------------------------
    def _entropy_threshold(self, batch: OptimizerBatch, buffer: ReplayBuffer) -> float | None:
        """The entropy from which tokens are trained on, one value for all ranks; None: on all."""
        share = self.config.high_entropy_token_ratio
        if share <= 0:
            return None
        parts = [
            entropies
            for micro in batch.microbatches
            for index in micro.indices
            if (entropies := buffer.samples[index].entropies) is not None
        ]
        mine = (torch.cat(parts) if parts else torch.zeros(0)).to(self.strategy.device)
        return entropy_threshold(self.strategy.gather_over_data(mine), share)


class DeviceSums:
    """Sums that stay on the device and are fetched once per optimizer step."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, mask: Tensor | None = None) -> None:
        """Add a 0-d value, or the sum of ``[B, T]`` values within a mask."""
        value = value.detach() if mask is None else value.detach().masked_fill(~mask, 0.0).sum()
        self.values[name] = self.values[name] + value.float() if name in self.values else value.float()

    def maximum(self, name: str, value: Tensor) -> None:
        """Keep the largest value; the name must end in ``_max``."""
        value = value.detach().float()
        self.values[name] = torch.maximum(self.values[name], value) if name in self.values else value

    def over_ranks(self, strategy: StrategyBase) -> dict[str, float]:
        """Totals and maxima over all ranks, which must have the same names. A collective."""
        totals: dict[str, float] = {}
        for op in ("sum", "max"):
            names = [name for name in self.values if name.endswith("_max") == (op == "max")]
            if names:
                packed = torch.stack([self.values[name] for name in names])
                totals |= dict(zip(names, strategy.reduce_over_data(packed, op).tolist(), strict=True))
        return totals
