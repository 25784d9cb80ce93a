"""The report at the end of a run: accuracy before and after, some answers, and where the files are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ANSWERS_SHOWN = 5
LONGEST_SHOWN = 60


def show_report(
    *,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    held_out: int,
    answers: Sequence[Mapping[str, Any]],
    output_dir: Path,
    seconds: float,
    steps: int,
) -> None:
    """Print the report; call it on rank 0 only.

    :param before: held-out accuracy and reward at the start; None if there was only one evaluation.
    :param after: at the end.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print()
    if after is not None:
        table = Table(title=f"Held-out prompts ({held_out}, greedy)", title_justify="left")
        table.add_column()
        for name in ("before RL", f"after {_steps(steps)}", "change"):
            table.add_column(name, justify="right")
        same = all(figures["reward"] == figures["accuracy"] for figures in (before, after) if figures)
        for name, value in after.items():
            if name == "reward" and same:  # each answer is worth 0 or 1: one row says it
                continue
            known = ("", "") if before is None else (f"{before[name]:.3f}", f"{value - before[name]:+.3f}")
            table.add_row(name, known[0], f"{value:.3f}", known[1])
        console.print(table)
    if answers:
        table = Table(title="Some held-out answers", title_justify="left")
        for name in ("prompt", "answer", "expected", ""):
            table.add_column(name)
        for answer in answers[:ANSWERS_SHOWN]:
            mark = "right" if answer["right"] else "wrong"
            table.add_row(
                _short(answer["prompt"]), _short(answer["response"]), _short(str(answer.get("label", ""))), mark
            )
        console.print(table)
    console.print(f"{_steps(steps)} in {seconds:.0f} s. Everything is in {output_dir}:", markup=False)
    console.print("  model/         the model, for transformers", markup=False)
    console.print("  metrics.jsonl  one line per step;  plots/  curves;  checkpoints/  for --resume", markup=False)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_SHOWN else "…" + text[-LONGEST_SHOWN:]
