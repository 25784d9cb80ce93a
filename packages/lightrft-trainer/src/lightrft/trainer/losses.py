"""The losses of a step, each a *sum* that a global count divides later.

A mean over a micro-batch would make a token's weight depend on the split of the batch. Here a loss returns the sum over
its micro-batch, and the trainer multiplies by 1 / :func:`loss_denominator`, a count over all ranks and micro-batches of
the optimizer step. So neither the micro-batch size nor the number of ranks changes the gradient.

Shapes: logprobs, advantages and masks are ``[B, T]``; everything outside the mask is ignored, even NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AggregationMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
PolicyObjective = Literal["ppo", "gspo", "cpgd"]


def aggregate(token_losses: Tensor, mask: Tensor, mode: AggregationMode) -> Tensor:
    """Sum token losses so that dividing by :func:`loss_denominator` gives the mean that ``mode`` names.

    - ``token-mean``: every token of the batch weighs the same (DAPO, arXiv:2503.14476, equation 12).
    - ``seq-mean-token-mean``: every sequence weighs the same (GRPO, arXiv:2402.03300, equation 3).
    - ``seq-mean-token-sum``: a sequence weighs its length (Dr. GRPO, arXiv:2503.20783, whose code divides by a
      constant length besides: without that ``--max_norm`` sees gradients so many times as large).

    :return: a 0-d tensor; for an empty mask 0 with a graph, so that every rank can call backward.
    """
    held = token_losses.masked_fill(~mask, 0.0)
    if mode in ("token-mean", "seq-mean-token-sum"):
        return held.sum()
    if mode == "seq-mean-token-mean":
        return (held.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
    raise ValueError(f"unknown loss_agg_mode {mode!r}; known are token-mean, seq-mean-token-mean, seq-mean-token-sum")


def loss_denominator(mode: AggregationMode, tokens: int, sequences: int) -> int:
    """The divisor of an aggregated sum, from the counts over all ranks; never below 1 (no tokens: loss 0, not
    NaN).
    """
    return max(1, tokens if mode == "token-mean" else sequences)


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss in parts.

    :param token_losses: ``[B, T]`` with gradient.
    :param clipped: ``[B, T]`` bool, where clipping removed the gradient.
    """

    token_losses: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: PolicyObjective = "ppo",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    weights: Tensor | None = None,
    drift_coef: float = 0.0,
    drift_clip: float = 0.2,
) -> PolicyLoss:
    """Token losses of the policy.

    - ``ppo``: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logp - old) (PPO, arXiv:1707.06347, equation 7;
      two clip ranges: DAPO, arXiv:2503.14476, section 3.1).
    - ``gspo``: the same with the sequence's ratio s = exp(mean of logp - old over its tokens), whose gradient reaches
      each token through its own logprob (GSPO-token, arXiv:2507.18071, equation 13).
    - ``cpgd``: -min(l A, clip(l, log(1 - eps_low), log(1 + eps_high)) A), l = logp - old: a policy gradient without
      the ratio, clipped where the ratio leaves its range. Plus ``drift_coef`` times the policy drift, KL(old ||
      policy): its value is the k3 estimate r - 1 - l, its gradient min(r - 1, ``drift_clip``) times that of logp, k3's
      gradient with a clip, without which one token with a large ratio would dominate the step (CPGD, arXiv:2505.12504,
      and its authors' ``policy_drift_clip_eps``).

    :param weights: ``[B, T]`` importance weights that correct for the engine's distribution, without gradient.
    """
    # Padding may hold anything; exp() of it must not reach the gradient as inf * 0.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    if objective == "gspo":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = log_ratio.detach().sum(dim=1, keepdim=True) / lengths
        log_ratio = mean + (log_ratio - log_ratio.detach())
    if objective in ("ppo", "gspo"):
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
        limited = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
        losses = -torch.minimum(ratio * advantages, limited * advantages)
    elif objective == "cpgd":
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
        # eps_low of 1 or more has no logarithm: no lower bound then.
        low = math.log1p(-eps_low) if eps_low < 1 else -math.inf
        limited = log_ratio.clamp(low, math.log1p(eps_high))
        losses = -torch.minimum(log_ratio * advantages, limited * advantages)
        if drift_coef:
            slope = (ratio.detach() - 1.0).clamp(max=drift_clip) * log_ratio
            value = (ratio - 1.0 - log_ratio).detach()
            losses = losses + drift_coef * (value + slope - slope.detach())
    else:
        raise ValueError(f"unknown policy objective {objective!r}; known are ppo, gspo, cpgd")
    ratio = ratio.detach()
    clipped = mask & torch.where(advantages > 0, ratio > 1.0 + eps_high, (advantages < 0) & (ratio < 1.0 - eps_low))
    if weights is not None:
        losses = losses * weights.masked_fill(~mask, 0.0)
    return PolicyLoss(losses, clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> Tensor:
    """Token losses of the critic: max((V - G)², (clip(V, old ± c) - G)²) / 2 (arXiv:2005.12729, section 3).

    :param value_clip: the range c; None does not clip.
    """
    plain = (values - returns).square()
    if value_clip is None:
        return plain / 2
    limited = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.maximum(plain, (limited - returns).square()) / 2


def truncated_importance_weights(trainer_logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_engine, cap): corrects for an engine that samples from slightly different probabilities.

    Truncated importance sampling (Ionides, 2008) as used for rollouts (https://fengyao.notion.site/off-policy-rl).

    :return: ``[B, T]`` without gradient.
    """
    return (trainer_logprobs - engine_logprobs).detach().clamp(-20.0, 20.0).exp().clamp(max=cap)


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy that the ``share`` of tokens with the highest entropy reach (arXiv:2506.01939).

    In the paper's objective the others are left out of the sum, while its divisor counts all tokens.

    :param entropies: ``[N]`` of all tokens of the batch, over all ranks.
    """
    if entropies.numel() == 0 or share >= 1:
        return -float("inf")
    keep = max(1, round(share * entropies.numel()))
    return float(entropies.float().kthvalue(entropies.numel() - keep + 1).values)
