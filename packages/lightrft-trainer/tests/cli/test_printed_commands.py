"""Each `lightrft train` command line that the documents print, put through the checks that a run begins with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightrft.cli import settings
from lightrft.cli.main import build_parser
from lightrft.strategy.errors import ConfigError

ROOT = Path(__file__).parents[4]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("packages/*/README.md"))]
COMMAND = re.compile(r"(?:^|`|uv run )lightrft (train(?:-vl)?\b[^`\n]*)", re.MULTILINE)


def printed() -> dict[str, str]:
    """Commands without ``lightrft``, and the first page that prints each."""
    found: dict[str, str] = {}
    for page in PAGES:
        for text in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            words = shlex.split(text, comments=True)
            if "--help" not in words:
                found.setdefault(shlex.join(words), str(page.relative_to(ROOT)))
    return found


def test_the_documents_print_commands() -> None:
    pages = {"README.md", "docs/usage.md", "docs/benchmarks.md", "docs/equivalence.md"}
    assert {*pages, "packages/lightrft-trainer/README.md"} <= set(printed().values())


@pytest.mark.parametrize("command", printed())
def test_a_printed_command_is_not_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lightrft_runs/latest").mkdir(parents=True)  # for --resume
    namespace, unknown = build_parser().parse_known_args(shlex.split(command))
    assert not unknown
    faults: list[str] = []
    try:
        config = settings.load_settings(namespace)
        settings.check_settings(config, multimodal=namespace.command == "train-vl", world_size=2)
    except ConfigError as error:
        faults = [fault for fault in error.problems if not _is_absent(fault, command)]
    assert not faults, printed()[command]


def _is_absent(fault: str, command: str) -> bool:
    """Whether it is about what the command names and this machine has not: a file, a model's folder, an engine."""
    named, _, reason = fault.partition(": no such ")
    return reason.startswith(("file", "folder")) or (reason.startswith(("engine", "strategy")) and named in command)
