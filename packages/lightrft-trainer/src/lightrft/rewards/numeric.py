"""The numeric reward: compares a response's answer with the label's number or expression.

Plain numbers are compared exactly, here. Everything else (LaTeX, fractions, intervals) goes to math-verify in a
helper process, because an endless loop in the algebra system can only be stopped by ending its process.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .math_worker import MathWorker
from .rules import accepted_answers, tagged_answers

logger = logging.getLogger(__name__)

MAX_ANSWER_CHARACTERS = 1000

_HASH_MARK = re.compile(r"####[ \t]*([^\n]+)")
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"[{}]")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")
_WITH_UNIT = re.compile(rf"({_NUMBER.pattern})\s+[A-Za-z]{{2,}}(?:\s+[A-Za-z]+)*\.?")
_MAGNITUDES = re.compile(r"\b(?:hundred|thousand|million|billion|dozen|percent)s?\b", re.IGNORECASE)
_PLAIN = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?")


def _last_boxed(text: str) -> list[tuple[int, str]]:
    """Start and contents of the last ``\\boxed{…}`` whose braces balance, if there is one; in one pass."""
    boxes = {match.end() - 1: match.start() for match in _BOXED.finditer(text)}
    opened: list[int] = []
    last = (-1, -1)
    for brace in _BRACE.finditer(text) if boxes else ():
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened and (opening := opened.pop()) in boxes:
            last = max(last, (opening, brace.start()))
    opening, closing = last
    return [] if opening < 0 else [(boxes[opening], text[opening + 1 : closing])]


def extract_answer(text: str) -> str | None:
    """The answer that a response gives: the last marked one, else the last number, else None.

    Marks are GSM8K's ``#### 42``, ``\\boxed{42}`` and ``<answer>42</answer>``; of several, the one that starts last
    counts.
    """
    marked = [(match.start(), match.group(1)) for match in _HASH_MARK.finditer(text)]
    marked += tagged_answers(text) + _last_boxed(text)
    if marked:
        inner = max(marked)[1].strip()
        return inner or None
    numbers = [match.group(0).strip() for match in _NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def reference_answer(label: str) -> str:
    """A label's answer: what follows its last ``####`` (GSM8K), or stands in ``\\boxed{}``, else all of it."""
    marked = [(match.start(), match.group(1)) for match in _HASH_MARK.finditer(label)] + _last_boxed(label)
    return max(marked)[1].strip() if marked else label.strip()


def plain_number(text: str) -> Fraction | None:
    """The exact value of a plainly written number (``1,234``, ``$3.50``, ``-2``, ``1e3``, ``3/4``), else None."""
    cleaned = text.strip().strip("$").replace("\\$", "").replace("$", "").replace("\\!", "").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", cleaned):
        cleaned = cleaned.replace(",", "")
    cleaned = cleaned.removesuffix(".") or cleaned
    if not _PLAIN.fullmatch(cleaned):
        return None
    numerator, _, denominator = cleaned.partition("/")
    try:
        return Fraction(numerator) / (Fraction(denominator) if denominator else 1)
    except ZeroDivisionError:
        return None


def answers_equal(answer: str, reference: str, *, worker: MathWorker) -> bool:
    """Whether two answers mean the same number or expression; an answer that cannot be read is wrong, not an error."""
    if answer.strip() == reference.strip():
        return True
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    ours, theirs = plain_number(answer), plain_number(reference)
    if ours is None and theirs is not None:
        with_unit = _WITH_UNIT.fullmatch(answer.strip())  # "18 dollars" for a label that says 18
        if with_unit and not _MAGNITUDES.search(answer):
            ours = plain_number(with_unit.group(1))
    if ours is not None and theirs is not None:
        return ours == theirs
    return worker.equal(answer, reference)


_shared_worker = MathWorker()


def numeric_answer(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
) -> list[float]:
    """1 if the response's answer is mathematically equal to the label's, else 0.

    The answer is found by :func:`extract_answer`, the label is read by :func:`reference_answer`. A comparison that
    takes longer than the worker's limit counts as wrong and is logged; so do those for which slow ones have left
    no time in the batch (``--reward_timeout``).
    """
    rewards, left_out = [], _shared_worker.left_out
    for index, (prompt, response, label) in enumerate(zip(prompts, responses, labels, strict=True)):
        references = accepted_answers(label, sample=index, prompt=prompt)
        answer = extract_answer(response)
        right = answer is not None and any(
            answers_equal(answer, reference_answer(reference), worker=_shared_worker) for reference in references
        )
        rewards.append(float(right))
    if _shared_worker.left_out > left_out:
        logger.warning(
            "%d comparisons were skipped for lack of time and count as unequal; give the batch of %d responses more "
            "with --reward_timeout",
            _shared_worker.left_out - left_out,
            len(responses),
        )
    return rewards
