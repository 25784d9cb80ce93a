"""Scores from reasoning-gym: each of its datasets has a function that judges its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightrft.data.reasoning_gym import import_reasoning_gym

from .protocol import RewardError, excerpt
from .rules import tagged_answers


def tagged_answer(response: str) -> str:
    """The text in the response's last ``<answer>…</answer>``, else all of it, without surrounding whitespace."""
    tagged = tagged_answers(response)
    return (tagged[-1][1] if tagged else response).strip()


def reasoning_gym_score(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
) -> list[float]:
    """The score, usually 0 to 1, from the sample's reasoning-gym dataset.

    Labels are reasoning-gym's entries (``question``, ``answer``, ``metadata``), as ``--prompt_data
    reasoning_gym:NAME`` yields them.

    :raises RewardError: a label is not such an entry, or reasoning-gym is not installed.
    """
    try:
        gym = import_reasoning_gym()
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward reasoning_gym needs {error.name}: pip install 'lightrft-trainer[reasoning-gym]'"
        ) from error

    scores = []
    for index, (prompt, response, label) in enumerate(zip(prompts, responses, labels, strict=True)):
        source = label.get("metadata", {}).get("source_dataset") if isinstance(label, Mapping) else None
        if not source:
            raise RewardError(
                f"sample {index} (prompt {excerpt(prompt)}): its label is not a reasoning-gym entry but "
                f"{str(label)[:80]!r}; use --prompt_data reasoning_gym:NAME, or another --reward",
                sample=index,
            )
        judge: Any = gym.get_score_answer_fn(source)
        scores.append(float(judge(tagged_answer(response), label)))
    return scores
