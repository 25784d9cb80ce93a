"""Rewards without a model: exact match, and the form of a response. Each uses only the response."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .protocol import RewardError, RewardFunction, excerpt

THINK_ANSWER_PATTERN = r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*"
BOXED_PATTERN = r"(?>.*?\\boxed\s*\{).+\}.*"  # only the first box is tried: trying each takes quadratic time


_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_END = "</answer>"


def tagged_answers(text: str) -> list[tuple[int, str]]:
    """Start and contents of every ``<answer>…</answer>``, in one pass over the text."""
    end = text.rfind(_ANSWER_END) + len(_ANSWER_END)  # no later tag is closed; there may be thousands
    return [(match.start(), match.group(1)) for match in _ANSWER_TAG.finditer(text, 0, end)]


def accepted_answers(label: Any, *, sample: int, prompt: str) -> tuple[str, ...]:
    """The correct answers for one sample: the label, each of a list of labels, or an entry's ``answer``.

    :raises RewardError: the sample has no label.
    """
    if isinstance(label, Mapping):  # a reasoning-gym entry
        label = label.get("answer")
    candidates = label if isinstance(label, (list, tuple)) else (label,)
    texts = tuple(str(candidate) for candidate in candidates if candidate is not None)
    if not texts:
        raise RewardError(
            f"sample {sample} (prompt {excerpt(prompt)}) has no label to compare with; name the label's key "
            "with --label_key",
            sample=sample,
        )
    return texts


def exact_match(prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any) -> list[float]:
    """1 if the response equals the label (or one of several) except for surrounding whitespace, else 0."""
    rewards = []
    for index, (prompt, response, label) in enumerate(zip(prompts, responses, labels, strict=True)):
        answers = accepted_answers(label, sample=index, prompt=prompt)
        rewards.append(float(response.strip() in {answer.strip() for answer in answers}))
    return rewards


def format_reward(pattern: str) -> RewardFunction:
    """A reward that is 1 if the *whole response* matches ``pattern`` (dots match line ends), else 0.

    The prompt is not used: a system prompt that shows the form must not earn the reward.

    :raises ValueError: the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"format reward: {pattern!r} is not a regular expression: {error}") from error

    def matches_format(
        prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
    ) -> list[float]:
        return [float(compiled.fullmatch(response) is not None) for response in responses]

    return matches_format


format_think_answer: Callable[..., Any] = format_reward(THINK_ANSWER_PATTERN)
"""``<think>…</think> <answer>…</answer>``, each once and nothing around them (DeepSeek-R1, arXiv:2501.12948)."""

format_boxed: Callable[..., Any] = format_reward(BOXED_PATTERN)
"""The response holds ``\\boxed{…}`` somewhere."""
