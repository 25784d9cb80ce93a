"""Rewards: rules, your own functions, servers. ``build_reward`` makes one from the command line's flags."""

from __future__ import annotations

from .checked import CheckedReward
from .combine import CombinedReward
from .numeric import numeric_answer
from .overlong import soft_overlong_penalty
from .protocol import RewardError, RewardFunction, RewardOutput, RewardTimeoutError
from .reasoning_gym_score import reasoning_gym_score
from .remote import RemoteReward
from .resolve import build_reward, needs_labels, parse_reward_spec, resolve_reward
from .rules import exact_match, format_reward

__all__ = [
    "CheckedReward",
    "CombinedReward",
    "RemoteReward",
    "RewardError",
    "RewardFunction",
    "RewardOutput",
    "RewardTimeoutError",
    "build_reward",
    "exact_match",
    "format_reward",
    "needs_labels",
    "numeric_answer",
    "parse_reward_spec",
    "reasoning_gym_score",
    "resolve_reward",
    "soft_overlong_penalty",
]
