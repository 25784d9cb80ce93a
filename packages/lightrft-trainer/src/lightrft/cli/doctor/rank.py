"""One rank of an examination: ``python -m lightrft.cli.doctor.rank CONFIG``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from lightrft.strategy.config import StrategyConfig

from ..launch import EXIT_FAILED, LAUNCH_DIR
from ..worker import join_launcher
from .findings import Finding, gather
from .notebook import Notebook, notes_file


def main() -> int:
    """Entry point of a rank."""
    parser = argparse.ArgumentParser(prog="lightrft-doctor-rank")
    parser.add_argument("config")
    options = parser.parse_args()
    join_launcher()
    # Standard output is for the report; what libraries print goes to standard error.
    os.dup2(2, 1)
    config = StrategyConfig.from_yaml(options.config)
    path = notes_file(Path(os.environ[LAUNCH_DIR]), int(os.environ["RANK"]))
    return 0 if _examined(config, Notebook(config, path)) else EXIT_FAILED


def examine_as_rank(config: StrategyConfig) -> list[Finding]:
    """Under the user's own launcher this process is the rank, and its notes are all it knows."""
    notebook = Notebook(config)
    _examined(config, notebook)
    return gather({int(os.environ["RANK"]): notebook.notes}, None)


def _examined(config: StrategyConfig, notebook: Notebook) -> bool:
    """Whether every check could be made; the notebook has what went wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .examination import examine

    try:
        examine(config, notebook)
    except Exception as error:  # noqa: BLE001 - the last frame of a rank: the notebook has it, and the others are told
        from lightrft.strategy.journal import note_departure

        note_departure(error)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
