"""The settings of :class:`lightrft.strategy.StrategyConfig` as command-line flags."""

from __future__ import annotations

import argparse
import typing
from typing import Any, Literal

from lightrft.strategy.config import FIELDS, StrategyConfig, field_groups

# Older spellings of a boolean flag's negative form; every other boolean --x is switched off by --no_x.
NEGATIVES = {"enable_engine_sleep": "--disable_engine_sleep"}


def add_arguments(parser: argparse.ArgumentParser, *, suppress_defaults: bool = False) -> argparse.ArgumentParser:
    """Add one flag for each setting, in groups. Flags that the parser has already are left as they are.

    :param suppress_defaults: leave out what the user did not type, so that it can be told from a default.
    :return: the parser.
    """
    hints = typing.get_type_hints(StrategyConfig)
    taken = frozenset(parser._option_string_actions)
    for title, names in field_groups().items():
        group = parser.add_argument_group(title)
        for name in names:
            if f"--{name}" not in taken:
                _add(group, name, hints[name], suppress_defaults, taken)
    return parser


def _add(group: Any, name: str, hint: Any, suppress: bool, taken: frozenset[str]) -> None:
    spec = FIELDS[name]
    default = argparse.SUPPRESS if suppress else spec.default
    text = _help(name)
    kind, choices, nargs = _parse_hint(hint)
    if kind is bool:
        negative = NEGATIVES.get(name, f"--no_{name}")
        group.add_argument(f"--{name}", action="store_true", default=default, help=text)
        if negative not in taken:
            group.add_argument(negative, action="store_false", dest=name, default=default, help=argparse.SUPPRESS)
        return
    if nargs is not None:
        group.add_argument(f"--{name}", type=kind, nargs=nargs, default=default, help=text, metavar="N")
        return
    metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
    group.add_argument(f"--{name}", type=kind, choices=choices, default=default, help=text, metavar=metavar)


def _help(name: str) -> str:
    spec = FIELDS[name]
    text = spec.metadata["help"]
    if spec.default is True:
        text += f" (default: on; off with {NEGATIVES.get(name, f'--no_{name}')})"
    elif spec.default is not None and spec.default is not False:  # 0 is a default like any other
        shown = " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _parse_hint(hint: Any) -> tuple[type, list[str] | None, int | None]:
    """A field's type as argparse wants it: (type, choices, nargs)."""
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if type(None) in typing.get_args(hint):  # Optional[X]
        return _parse_hint(arguments[0])
    if typing.get_origin(hint) is Literal:
        return str, list(arguments), None
    if typing.get_origin(hint) is tuple:
        return arguments[0], None, len(arguments)
    return hint, None, None
