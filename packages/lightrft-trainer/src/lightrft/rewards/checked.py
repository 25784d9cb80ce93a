"""Rewards with checks: every call has a deadline, and every result is one finite number per sample."""

from __future__ import annotations

import inspect
import math
import numbers
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .deadline import LateCallError, call_with_deadline
from .protocol import RewardError, RewardFunction, RewardOutput, RewardTimeoutError, excerpt

DEFAULT_TIMEOUT_SECONDS = 60.0


def check_signature(function: Any, name: str) -> frozenset[str] | None:
    """The keywords that a reward takes besides prompts, responses and labels; None if it takes any.

    :raises RewardError: it is not callable, or not with those three.
    """
    if not callable(function):
        raise RewardError(f"reward {name}: {function!r} is not a function; write module:function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some compiled callables have no signature: then the call itself will show
        return None
    try:
        signature.bind_partial((), (), ())  # others may be extras
    except TypeError as error:
        raise RewardError(
            f"reward {name}{signature} cannot be called with (prompts, responses, labels): {error}; "
            "write `def reward(prompts, responses, labels, **extras)`"
        ) from error
    parameters = list(signature.parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters[3:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def numbers_of(values: Any, count: int, *, name: str, prompts: Sequence[str]) -> list[float]:
    """``count`` finite floats from the sequence, tensor or array that a reward returned.

    :raises RewardError: it returned something else; the message names the first sample at fault.
    """
    advice = "return one finite number for each response"
    if hasattr(values, "tolist") and not isinstance(values, (list, tuple)):
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise RewardError(f"{name} returned {type(values).__name__} {str(values)[:80]!r} for {count} samples; {advice}")
    if len(values) != count:
        raise RewardError(f"{name} returned {len(values)} numbers for {count} samples; {advice}, in their order")
    checked = []
    for index, value in enumerate(values):
        if hasattr(value, "item") and not isinstance(value, numbers.Number):
            value = value.item() if getattr(value, "ndim", 0) == 0 else value
        if not isinstance(value, numbers.Real):
            raise RewardError(
                f"{name} returned {value!r}, a {type(value).__name__}, for sample {index} (prompt "
                f"{excerpt(prompts[index])}); {advice}",
                sample=index,
            )
        number = float(value)
        if not math.isfinite(number):
            raise RewardError(
                f"{name} returned {number} for sample {index} (prompt {excerpt(prompts[index])}); {advice}, "
                "0 for a response that cannot be judged",
                sample=index,
            )
        checked.append(number)
    return checked


class CheckedReward:
    """A reward function behind a deadline and a check of what it returns.

    :param function: see :class:`~lightrft.rewards.protocol.RewardFunction`.
    :param name: its name in messages and metrics.
    :param timeout: seconds that one call, for one batch, may take.
    :raises RewardError: at construction, if the function cannot be called as a reward.
    """

    def __init__(self, function: RewardFunction, *, name: str, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        if not timeout > 0:
            raise ValueError(f"reward {name}: timeout={timeout} must be positive (seconds)")
        self.function = function
        self.name = name
        self.timeout = timeout
        self._keywords = check_signature(function, name)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[Any], **extras: Any
    ) -> RewardOutput:
        """Rewards of one batch. No samples give no rewards, without calling the function.

        :raises RewardError: it raised, or did not return one finite number per sample.
        :raises RewardTimeoutError: it was late.
        """
        count = len(responses)
        if not len(prompts) == len(labels) == count:
            raise RewardError(
                f"reward {self.name}: {len(prompts)} prompts, {count} responses and {len(labels)} labels; the "
                "numbers must be equal"
            )
        if count == 0:
            return RewardOutput(rewards=[])
        wanted = extras if self._keywords is None else {key: extras[key] for key in self._keywords & extras.keys()}
        start = time.monotonic()
        try:
            result = call_with_deadline(lambda: self.function(prompts, responses, labels, **wanted), self.timeout)
        except LateCallError as late:
            raise self._late(late, prompts) from None
        except RewardError:
            raise
        except Exception as error:
            remaining = self.timeout - (time.monotonic() - start)
            raise self._raised(error, prompts, responses, labels, wanted, remaining) from error
        return self._checked(result, prompts)

    def _checked(self, result: Any, prompts: Sequence[str]) -> RewardOutput:
        name, count = f"reward {self.name}", len(prompts)
        if not isinstance(result, RewardOutput):
            return RewardOutput(rewards=numbers_of(result, count, name=name, prompts=prompts))
        return RewardOutput(
            rewards=numbers_of(result.rewards, count, name=name, prompts=prompts),
            metrics={
                key: numbers_of(values, count, name=f"{name}, metric {key},", prompts=prompts)
                for key, values in result.metrics.items()
            },
        )

    def _late(self, late: LateCallError, prompts: Sequence[str]) -> RewardTimeoutError:
        return RewardTimeoutError(
            f"reward {self.name} did not return within {self.timeout:g} s for {len(prompts)} sample(s), "
            f"the first with prompt {excerpt(prompts[0])}; it was at {late.where}. "
            "Give it more time with --reward_timeout, or a time limit of its own"
        )

    def _raised(
        self,
        error: Exception,
        prompts: Sequence[str],
        responses: Sequence[str],
        labels: Sequence[Any],
        extras: Mapping[str, Any],
        remaining: float,
    ) -> RewardError:
        """Find the sample at fault by grading one sample at a time, in the rest of the deadline."""
        count = len(prompts)
        culprit = 0 if count == 1 else None
        end = time.monotonic() + remaining
        for index in range(count if count > 1 else 0):
            left = end - time.monotonic()
            if left <= 0:
                break
            alone = {
                key: value[index : index + 1] if isinstance(value, (list, tuple)) and len(value) == count else value
                for key, value in extras.items()
            }
            one = slice(index, index + 1)
            try:
                call_with_deadline(
                    lambda one=one, alone=alone: self.function(prompts[one], responses[one], labels[one], **alone), left
                )
            except Exception:  # noqa: BLE001 - the first sample that fails alone, with any error, is reported
                culprit = index
                break
        cause = f"{type(error).__name__}: {error}"
        if culprit is None:
            return RewardError(
                f"reward {self.name} raised {cause} for a batch of {count} samples, though for none of them alone; "
                f"the first has prompt {excerpt(prompts[0])}"
            )
        label, advice = labels[culprit], "correct the function, or let it return 0 for what it cannot judge"
        if label is None:
            advice = f"if it needs a label, name the label's key with --label_key; else {advice}"
        return RewardError(
            f"reward {self.name} raised {cause} for sample {culprit} of {count} (prompt {excerpt(prompts[culprit])}, "
            f"response {excerpt(responses[culprit])}, label {str(label)[:80]!r}); {advice}",
            sample=culprit,
        )
