"""Held-out accuracy: greedy answers, graded by the run's own rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .experience_maker import ExperienceMaker
    from .grading import Grader


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, the same on every rank.

    :param accuracy: fraction of correct answers. :param reward: their mean reward. :param count: prompts.
    :param answers: the first few: prompt, response, label, reward, right.
    """

    accuracy: float
    reward: float
    count: int
    answers: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    maker: ExperienceMaker, grader: Grader, prompts: Sequence[Any], *, step: int, shown: int = 8
) -> EvaluationResult:
    """Answer every prompt greedily, distributed over the data ranks, and grade the answers. A collective.

    :param prompts: all of them, on every rank.
    :param shown: number of answers to keep.
    """
    strategy = maker.strategy
    rank, ranks = strategy.data_parallel_rank, strategy.data_parallel_size
    mine = list(prompts[rank::ranks])
    sampling = replace(maker.sampling, n=1, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, logprobs=False)
    with strategy.engine_host.lengths.paused():
        outputs = maker.generate(mine, sampling, step)
    samples = [maker.to_sample(output, prompt) for output, prompt in zip(outputs, mine, strict=True)]
    graded = grader(mine, samples, 1, step, trajectories=shown)
    totals = strategy.reduce_over_data(
        {"right": sum(graded.right), "reward": sum(graded.rewards), "count": len(mine)}, "sum"
    )
    parts = strategy.gather_over_data(graded.trajectories)
    answers = [answer for together in zip(*parts, strict=False) for answer in together] or [
        a for part in parts for a in part
    ]
    count = max(1, totals["count"])
    return EvaluationResult(totals["right"] / count, totals["reward"] / count, totals["count"], answers[:shown])
