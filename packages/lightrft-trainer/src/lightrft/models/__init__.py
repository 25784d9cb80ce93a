"""Actors, critics and reward models: plain modules around transformers models, which any strategy can shard."""

from __future__ import annotations

from .actor import Actor, ActorLanguage, ActorVL
from .critic import Critic, CriticLanguage, CriticVL
from .logprobs import entropy_from_logits, logprobs_from_logits, token_statistics_from_logits
from .reward_model import RewardModel, get_llm_for_sequence_regression
from .rows import TokenRows, pad_rows

__all__ = [
    "Actor",
    "ActorLanguage",
    "ActorVL",
    "Critic",
    "CriticLanguage",
    "CriticVL",
    "RewardModel",
    "TokenRows",
    "entropy_from_logits",
    "get_llm_for_sequence_regression",
    "logprobs_from_logits",
    "pad_rows",
    "token_statistics_from_logits",
]
