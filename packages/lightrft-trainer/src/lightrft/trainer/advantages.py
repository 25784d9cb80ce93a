"""How rewards become advantages.

Rewards of a step come as ``[P, n]``: one row for each prompt, one column for each of its samples. An estimator turns
them into one score per sample (:func:`group_scores`); :func:`discounted_returns` spreads a score and the token rewards
over the tokens of the response. GAE works on token rewards and values instead (:func:`gae`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["group_norm", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline", "gae"]
GROUP_ESTIMATORS = ("group_norm", "grpo", "dr_grpo", "rloo")
STD_EPS = 1e-6

# Sums a small float64 vector over all data ranks. Not needed in one process.
SumOverRanks = Callable[[Tensor], Tensor]


def group_scores(rewards: Tensor, estimator: Estimator, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """One score for each sample, compared with the other samples of its prompt.

    With rewards r_1 ... r_n of one prompt:

    - ``group_norm`` = ``grpo``: (r_i - mean) / (std + eps), std with n - 1 in the denominator (GRPO, arXiv:2402.03300,
      4.1.2).
    - ``dr_grpo``: r_i - mean (Dr. GRPO, arXiv:2503.20783, equation 3: no division by the standard deviation).
    - ``rloo``: r_i - mean of the others = n / (n - 1) · (r_i - mean) (RLOO, arXiv:2402.14740, section 3.3).
    - ``reinforce``: r_i (Williams, 1992).
    - ``reinforce_baseline``: (r_i - mean) / std over the whole batch of r_i - mean (REINFORCE++-baseline,
      arXiv:2501.03262); with one sample per prompt the mean is that of the batch.
    - ``gae``: r_i; the critic is the baseline.

    A group whose rewards are all equal scores exactly 0, never NaN.

    :param rewards: ``[P, n]`` floats; computed in float64.
    :param sum_over_ranks: needed by ``reinforce_baseline`` if the batch is spread over ranks. A collective: every
        data rank must call.
    :return: ``[P, n]``, dtype of ``rewards``.
    :raises ValueError: a group estimator with fewer than two samples per prompt.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; group_scores needs [prompts, samples per prompt]")
    n = rewards.shape[1]
    if estimator in GROUP_ESTIMATORS and n < 2:
        raise ValueError(
            f"{estimator} compares the samples of a prompt; n_samples_per_prompt must be at least 2, not {n}"
        )
    if estimator in ("reinforce", "gae"):
        return rewards.clone()
    exact = rewards.double()
    if estimator == "reinforce_baseline" and n < 2:
        centred = exact - _moments(exact, sum_over_ranks)[0]
    else:
        centred = exact - exact.mean(dim=1, keepdim=True)
        # 8 × 0.1 does not average to 0.1 in binary: without this, rounding noise would be divided by eps.
        equal = exact.max(dim=1, keepdim=True).values == exact.min(dim=1, keepdim=True).values if n else centred.bool()
        centred = centred.masked_fill(equal, 0.0)
    if estimator in ("group_norm", "grpo"):
        scores = centred / (centred.square().sum(dim=1, keepdim=True) / (n - 1)).sqrt().add(STD_EPS)
    elif estimator == "rloo":
        scores = centred * (n / (n - 1))
    elif estimator == "reinforce_baseline":
        scores = centred / (_moments(centred, sum_over_ranks)[1].sqrt() + STD_EPS)
    elif estimator == "dr_grpo":
        scores = centred
    else:
        known = ", ".join((*GROUP_ESTIMATORS, "reinforce", "reinforce_baseline", "gae"))
        raise ValueError(f"unknown advantage_estimator {estimator!r}; known are {known}")
    return scores.to(rewards.dtype)


def discounted_returns(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma · G_{t+1} over the response tokens of each row.

    :param token_rewards: ``[B, T]`` floats; values outside ``mask`` are ignored.
    :param mask: ``[B, T]`` bool; True on the response, which is contiguous.
    :return: ``[B, T]``, 0 outside ``mask``.
    """
    held = token_rewards * mask
    if gamma == 1.0:
        return held.flip(1).cumsum(1).flip(1) * mask
    returns = torch.zeros_like(held)
    running = torch.zeros_like(held[:, 0])
    for t in reversed(range(held.shape[1])):
        running = (held[:, t] + gamma * running) * mask[:, t]
        returns[:, t] = running
    return returns


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16), and the returns to fit the critic to.

    delta_t = r_t + gamma · V_{t+1} - V_t; A_t = delta_t + gamma · lambda · A_{t+1}; the value after the last token is
    0.

    :param token_rewards: ``[B, T]``.
    :param values: ``[B, T]``: ``values[:, t]`` is V of the state in which token t was drawn.
    :param mask: ``[B, T]`` bool, contiguous.
    :return: advantages and returns (= advantages + values), ``[B, T]``, 0 outside ``mask``.
    """
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    held = mask.to(values.dtype)
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lambd * running) * held[:, t]
        next_value = values[:, t] * held[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * held


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """The score on the last response token of each row, minus the KL penalty on every response token.

    :param scores: ``[B]``.
    :param mask: ``[B, T]`` bool; a row without a response gets no reward.
    :param kl: ``[B, T]`` estimates, or None.
    :return: ``[B, T]``, dtype of ``scores``.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)
    at_end = positions.unsqueeze(0) == last.unsqueeze(1)
    rewards = scores.unsqueeze(1) * at_end
    if kl is not None and kl_coef:
        rewards = rewards - kl_coef * kl * mask
    return rewards


def whiten(values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over all tokens of the batch, on all ranks together.

    :param values: ``[B, T]``. :param mask: ``[B, T]`` bool.
    :return: ``[B, T]``, 0 outside ``mask``; all 0 if the values do not vary.
    """
    mean, variance = _moments(values.double()[mask], sum_over_ranks)
    whitened = (values.double() - mean) / (variance.sqrt() + 1e-8)
    return (whitened * mask).to(values.dtype)


def _moments(values: Tensor, sum_over_ranks: SumOverRanks | None) -> tuple[Tensor, Tensor]:
    """Mean and population variance over every element on every rank; the variance in a second pass, for accuracy."""
    reduce = sum_over_ranks or (lambda vector: vector)
    total = reduce(torch.stack([values.sum(), values.new_tensor(float(values.numel()))]))
    mean = total[0] / total[1].clamp(min=1.0)
    squares = reduce((values - mean).square().sum().reshape(1))[0]
    return mean, squares / total[1].clamp(min=1.0)
