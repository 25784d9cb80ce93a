"""From the command line to a reward: rule names, ``module:function``, weights."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .checked import DEFAULT_TIMEOUT_SECONDS, CheckedReward, check_signature
from .combine import CombinedReward
from .numeric import numeric_answer
from .protocol import RewardError, RewardFunction
from .reasoning_gym_score import reasoning_gym_score
from .remote import RemoteReward
from .rules import exact_match, format_boxed, format_think_answer

RULES: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "format": format_think_answer,
    "format_boxed": format_boxed,
    "numeric_answer": numeric_answer,
    "reasoning_gym": reasoning_gym_score,
}
LABELLED = frozenset({"exact_match", "numeric_answer", "reasoning_gym"})
"""The rules that compare with a label."""


def resolve_reward(name: str) -> RewardFunction:
    """The reward called ``name``: a rule, or ``package.module:function`` from Python's path or the current directory.

    :raises RewardError: no such rule, module or attribute, or it cannot be called as a reward.
    """
    name = name.strip()
    if name in RULES:
        return RULES[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, RULES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RewardError(
            f"reward {name!r} is unknown.{hint} Known are {', '.join(sorted(RULES))}, or write module:function"
        )
    if module_name.endswith(".py") or "/" in module_name or os.sep in module_name:
        dotted = module_name.removesuffix(".py").replace(os.sep, ".").replace("/", ".").strip(".")
        raise RewardError(
            f"reward {name!r} names a file; write it as a module, for example {dotted}:{attribute or 'reward'}"
        )
    target: Any = _import(module_name, name)
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            functions = sorted(
                key for key, value in vars(target).items() if callable(value) and not key.startswith("_")
            )
            raise RewardError(
                f"reward {name!r}: {module_name} has no {part!r}; it has {', '.join(functions) or 'no function'}"
            ) from error
    check_signature(target, name)
    return target


def _import(module_name: str, name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:  # a console script does not search the current directory, as `python` does
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise RewardError(
                f"reward {name!r}: no module {missing!r} on Python's path or in {here}; install it, or start "
                "from its folder"
            ) from error
        raise RewardError(f"reward {name!r}: {module_name} needs {missing!r}, which is not installed") from error
    except Exception as error:
        raise RewardError(f"reward {name!r}: importing {module_name} raised {type(error).__name__}: {error}") from error


def parse_reward_spec(spec: str) -> list[tuple[str, float]]:
    """``"exact_match,format=0.1"`` as names and weights; the default weight is 1.

    :raises RewardError: an empty part, or a weight that is not a number.
    """
    parsed = []
    for part in spec.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if not name:
            raise RewardError(
                f"--reward {spec!r}: an empty part; write names separated by commas, for example exact_match,format=0.1"
            )
        try:
            parsed.append((name, float(weight) if equals else 1.0))
        except ValueError as error:
            raise RewardError(f"--reward {spec!r}: {weight!r} is not a weight; write {name}=0.5") from error
    return parsed


def needs_labels(spec: str | None) -> bool:
    """Whether a rule of ``--reward`` compares with labels; a user's own function may not need them."""
    return any(name in LABELLED for name, _ in (parse_reward_spec(spec) if spec else []))


def build_reward(
    spec: str | None = None, *, remote_urls: str | Sequence[str] | None = None, timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> CombinedReward:
    """The reward of a run, from ``--reward`` and ``--remote_rm_url``; with both, their sum.

    :param spec: for example ``"exact_match,format=0.1,my_rewards:brevity=-0.2"``.
    :param remote_urls: one or more URLs of a reward server, as a list or separated by commas; they take batches in
        turn.
    :param timeout: seconds for one call of each reward.
    :raises RewardError: neither is given, or one of them is wrong.
    """
    parts: list[tuple[CheckedReward, float]] = []
    for name, weight in parse_reward_spec(spec) if spec else []:
        parts.append((CheckedReward(resolve_reward(name), name=name, timeout=timeout), weight))
    if remote_urls:
        urls = remote_urls.split(",") if isinstance(remote_urls, str) else remote_urls
        # Its own deadline names the server, so it is a little before the general one.
        parts.append((CheckedReward(RemoteReward(urls, timeout=timeout), name="remote", timeout=timeout + 5.0), 1.0))
    if not parts:
        raise RewardError(
            f"no reward: give --reward (one of {', '.join(sorted(RULES))}, or module:function) or --remote_rm_url"
        )
    try:
        return CombinedReward(parts)
    except RewardError:
        raise
    except ValueError as error:
        raise RewardError(str(error)) from error
