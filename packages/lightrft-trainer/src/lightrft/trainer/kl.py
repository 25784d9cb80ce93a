"""Estimators of the KL divergence from samples (Schulman, http://joschu.net/blog/kl-approx.html).

With x drawn from p, and r = q(x) / p(x), KL(p || q) is estimated by

- k1 = -log r: unbiased, high variance, may be negative;
- k2 = (log r)² / 2: biased, low variance;
- k3 = r - 1 - log r: unbiased, low variance, never negative.

Which one to use where depends on the gradient that follows, not on the value. With p the policy and q the reference:

- in the *reward* the estimate is a number that a token's logprob is weighed with, and the gradient is that of
  KL(p || q) for k1 alone. For k3 it is that of KL(p || q) - KL(q || p), which are equal to second order, and for k2
  nearly so: the policy is hardly held, and may even be pushed away.
- in the *loss* the gradient of k2 is that of KL(p || q), that of k3 is that of KL(q || p) (GRPO, arXiv:2402.03300,
  equation 4), and that of k1 has expectation 0.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def approximate_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) for tokens drawn from the policy.

    :param logprobs: of the policy, any shape. :param reference_logprobs: of the reference, same shape.
    :raises ValueError: unknown estimator.
    """
    log_ratio = reference_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        # expm1 keeps the difference where the policies nearly agree; the clamp keeps one odd token from becoming inf,
        # in both terms, or such a token's gradient would lead away from the reference.
        log_ratio = log_ratio.clamp(max=20.0)
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"unknown kl_estimator {estimator!r}; known are k1, k2, k3")
