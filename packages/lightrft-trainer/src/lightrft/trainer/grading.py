"""Responses to rewards: rule rewards, reward servers and reward models, added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightrft.rewards import CombinedReward, RewardError, RewardOutput
from lightrft.strategy.scoring import RewardEngine

from .experience import Experience, make_batch

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase


@dataclass(frozen=True)
class Grades:
    """What grading found for this rank's samples.

    :param rewards: one per sample. :param right: 1.0 if the answer counts as right (see :class:`Grader`).
    :param metrics: sums over the samples, by name. :param trajectories: texts of the samples, if requested.
    """

    rewards: list[float]
    right: list[float]
    metrics: dict[str, float] = field(default_factory=dict)
    trajectories: list[dict[str, Any]] = field(default_factory=list)


class Grader:
    """Grades samples: the sum of all rewards. Rewards see the response without special tokens, and never the prompt in
    it.

    An answer counts as *right* if the first reward is at least 1 before weighting, so that
    ``exact_match,format=0.1`` measures exact matches.

    :param rewards: functions of (prompts, responses, labels), each called with this rank's samples.
    :param models: reward models: ``model(tokens, attention_mask=...)`` gives ``[B]`` scores; or engines that serve one.
    :param micro_batch_size: rows of a reward model's forward pass.
    """

    def __init__(
        self,
        strategy: StrategyBase,
        tokenizer: Any,
        rewards: Sequence[Any],
        *,
        models: Sequence[nn.Module | RewardEngine] = (),
        micro_batch_size: int = 8,
    ) -> None:
        if not rewards and not models:
            raise RewardError("nothing grades the responses: pass reward_fn or reward_model, or set --reward")
        self.strategy, self.tokenizer = strategy, tokenizer
        self.rewards, self.models, self.micro_batch_size = list(rewards), list(models), micro_batch_size

    def __call__(
        self, prompts: Sequence[Any], samples: Sequence[Experience], n: int, step: int, *, trajectories: int = 0
    ) -> Grades:
        """Grade ``n`` samples of each prompt. Every rank must call.

        :param trajectories: keep the texts of this many samples.
        :raises RewardError: a reward raised, was late, or gave not one finite number a sample, on any rank.
        """
        with self.strategy.together("grading", RewardError):
            return self._grade(prompts, samples, n, step, trajectories)

    def _grade(
        self, prompts: Sequence[Any], samples: Sequence[Experience], n: int, step: int, trajectories: int
    ) -> Grades:
        responses = [sample.tokens[sample.length - sample.response_length :].tolist() for sample in samples]
        # transformers decodes no responses to one empty text
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True) if responses else []
        repeated = [prompt for prompt in prompts for _ in range(n)]
        columns: list[list[float]] = []
        metrics: dict[str, float] = {}
        first: list[float] | None = None
        for reward in self.rewards:
            ask = partial(self._ask, reward, repeated, texts, samples)
            output = self.strategy.once_a_sequence(ask, RewardError)
            columns.append([float(value) for value in output.rewards])
            metrics |= {name: sum(map(float, values)) for name, values in output.metrics.items()}
            first = _first_part(reward, output) if first is None else first
        for number, model in enumerate(self.models):
            columns.append(self._score(model, samples))
            metrics["model" if len(self.models) == 1 else f"model_{number}"] = sum(columns[-1])
        totals = [math.fsum(values) for values in zip(*columns, strict=True)]
        right = [float(value >= 1.0) for value in (totals if first is None else first)]
        rows = list(zip(repeated, texts, totals, right, strict=True))[:trajectories]
        kept = [
            {
                "step": step + 1,
                "prompt": p.prompt,
                "response": text,
                "label": p.label,
                "reward": reward,
                "right": bool(ok),
            }
            for p, text, reward, ok in rows
        ]
        return Grades(totals, right, metrics, kept)

    def _ask(
        self, reward: Any, prompts: Sequence[Any], texts: list[str], samples: Sequence[Experience]
    ) -> RewardOutput:
        output = reward(
            [prompt.prompt for prompt in prompts],
            texts,
            [prompt.label for prompt in prompts],
            finish_reasons=["stop" if sample.finished else "length" for sample in samples],
            response_lengths=[sample.response_length for sample in samples],
            images=[prompt.images for prompt in prompts],
        )
        return output if isinstance(output, RewardOutput) else RewardOutput(output)

    @torch.no_grad()
    def _score(self, model: nn.Module | RewardEngine, samples: Sequence[Experience]) -> list[float]:
        """A reward model's scores of this rank's samples. Every rank calls.

        :raises RewardError: a score is not finite.
        """
        if isinstance(model, RewardEngine):
            scores = model.score([sample.tokens.tolist() for sample in samples])
        else:
            scores = self._score_here(model, samples)
        for number, score in enumerate(scores):
            if not math.isfinite(score):
                raise RewardError(
                    f"reward model: sample {number} of this rank scored {score}; are its weights damaged?"
                )
        return scores

    def _score_here(self, model: nn.Module, samples: Sequence[Experience]) -> list[float]:
        """Every rank runs the same number of forward passes, since the model may be sharded."""
        size = self.micro_batch_size
        rounds = self.strategy.all_reduce(-(-len(samples) // size), "max")
        scores: list[float] = []
        for i in range(rounds):
            part = samples[i * size : (i + 1) * size]
            batch = make_batch(part, self.tokenizer.pad_token_id or 0, self.strategy.device, ())
            values = model(batch.tokens, attention_mask=batch.attention_mask)
            scores += values.float().flatten().tolist()[: len(part)]
        return scores


def _first_part(reward: Any, output: RewardOutput) -> list[float]:
    """The unweighted rewards of a combined reward's first part; of any other reward, all of it."""
    rewards = [float(value) for value in output.rewards]
    if not isinstance(reward, CombinedReward):
        return rewards
    part, weight = reward.parts[0]
    if part.name in output.metrics and len(reward.parts) > 1:
        return [float(value) for value in output.metrics[part.name]]
    return [value / weight for value in rewards]
