"""Write docs/configuration.md, the reference page of every setting: `uv run python tools/configuration_page.py`.

The settings are written once, in StrategyConfig; a test compares the page with them.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

from lightrft.strategy.config import FIELDS, StrategyConfig, field_groups

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Settings

Each is a field of `StrategyConfig`, a flag (`--name`) of `lightrft train` and of `lightrft.utils.add_arguments`, and a
key of a `--config run.yaml`. Flags win over the file, the file over the preset. A boolean flag is switched off by
`--no_NAME` (`--disable_engine_sleep` for the engine's sleep). Written by `tools/configuration_page.py`.
"""


def page() -> str:
    """The whole page as Markdown."""
    hints = typing.get_type_hints(StrategyConfig)
    parts = [HEAD]
    for group, names in field_groups().items():
        parts += [f"\n## {group[0].upper()}{group[1:]}\n", "| name | type | default | |", "|---|---|---|---|"]
        parts += [_row(name, hints[name]) for name in names]
    return "\n".join(parts) + "\n"


def _row(name: str, hint: Any) -> str:
    spec = FIELDS[name]
    text = spec.metadata["help"]
    if spec.metadata["rule"]:
        text += f" Must be {spec.metadata['rule'][1]}."
    cells = (f"`{name}`", _type(hint), _default(spec.default), text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(hint: Any) -> str:
    arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if type(None) in typing.get_args(hint):
        return _type(arguments[0])
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if typing.get_origin(hint) is tuple:
        return f"{len(arguments)} × {_type(arguments[0])}"
    return hint.__name__


def _default(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
