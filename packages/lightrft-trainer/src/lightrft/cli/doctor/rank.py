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
    # Standard output is the report's alone: what libraries print goes beside it.
    os.dup2(2, 1)
    config = StrategyConfig.from_yaml(options.config)
    path = notes_file(Path(os.environ[LAUNCH_DIR]), int(os.environ["RANK"]))
    return 0 if _examined(config, Notebook(config, path)) else EXIT_FAILED


def examine_as_rank(config: StrategyConfig) -> list[Finding]:
    """Under a launcher of the user's own: this process is the rank, and what it noted is all that it knows."""
    notebook = Notebook(config)
    _examined(config, notebook)
    return gather({int(os.environ["RANK"]): notebook.notes}, None)


def _examined(config: StrategyConfig, notebook: Notebook) -> bool:
    """Whether every check could be made; what went wrong is in the notebook."""
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
