"""A rank's notes: a line when a check begins and one when it ends, so that a killed rank leaves them too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import LightRFTError, RankTimeoutError

from .cures import diagnose, layer_of
from .findings import Finding, Status


@dataclass
class Entry:
    """What a check has found so far; ``problem`` makes it a failure, or with ``status`` a warning."""

    status: Status = "ok"
    text: str = ""
    cure: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def problem(self, text: str, cure: str, status: Status = "failed") -> None:
        """Note that something is wrong. The check continues."""
        self.status, self.cure = status, cure
        self.text = f"{self.text}\n{text}" if self.text else text


class Notebook:
    """Notes of one rank. :param path: a file, or None to keep them in memory alone."""

    def __init__(self, config: StrategyConfig, path: Path | None = None) -> None:
        self.config, self.path = config, path
        self.notes: list[Mapping[str, Any]] = []

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Entry]:
        """Note a check. An error in it becomes a finding and is raised again, since later checks need this one."""
        self._write({"begun": name})
        entry, begun = Entry(), time.monotonic()
        try:
            yield entry
        except Exception as error:
            self._write(dataclasses.asdict(self._failed(name, error)))
            raise
        figures = {**entry.figures, "seconds": round(time.monotonic() - begun, 3)}
        layer = "" if entry.status in ("ok", "skipped") else layer_of(name, self.config)
        found = Finding(check=name, status=entry.status, text=entry.text, layer=layer, cure=entry.cure, figures=figures)
        self._write(dataclasses.asdict(found))

    def _failed(self, name: str, error: Exception) -> Finding:
        layer, cure = diagnose(error, name, self.config)
        foreseen = isinstance(error, LightRFTError)
        secondary = isinstance(error, RankTimeoutError) or (foreseen and error.of_another_rank)
        return Finding(
            check=name,
            status="failed",
            text=str(error) if foreseen else f"{type(error).__name__}: {error}",
            layer=layer,
            cure=cure,
            trace="" if foreseen else "".join(traceback.format_exception(error)),
            secondary=secondary,
        )

    def _write(self, note: Mapping[str, Any]) -> None:
        self.notes.append(note)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")


def notes_file(folder: Path, rank: int) -> Path:
    """Where a rank keeps its notes."""
    return folder / f"notes.{rank}.jsonl"


def read_notes(folder: Path) -> dict[int, list[Mapping[str, Any]]]:
    """Every rank's notes, without a last line that a killed rank left unfinished."""
    found = {}
    for path in folder.glob("notes.*.jsonl"):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        found[int(path.name.split(".")[1])] = [json.loads(line) for line in lines]
    return found
