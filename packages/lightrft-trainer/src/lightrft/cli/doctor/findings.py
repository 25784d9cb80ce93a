"""What an examination found, and the verdict on it. Pure: nothing here looks at the machine."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "failed", "skipped"]

# In the order in which they are made; a failure ends the examination.
BEFORE_RANKS = ("packages", "namespace", "machine", "settings")
ON_RANKS = ("ranks", "model", "training", "engine", "weight sync", "generation", "drift", "sleep")
CHECKS = (*BEFORE_RANKS, *ON_RANKS)
TEXT_WIDTH = 96
MARKS: Mapping[Status, str] = {"ok": "ok", "warning": "WARN", "failed": "FAIL", "skipped": "-"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    :param text: the finding in words. :param layer: the part at fault, for a warning or a failure.
    :param cure: what to do about it. :param figures: its numbers, by name and unit.
    :param trace: the traceback of an unexpected error.
    :param secondary: the failure is another rank's, of which this one heard or for which it waited.
    """

    check: str
    status: Status = "ok"
    text: str = ""
    layer: str = ""
    cure: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""
    secondary: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole examination.

    :param subject: what was examined, such as ``{"backend": "fsdp", "engine": "hf", "ranks": 2}``.
    """

    findings: Sequence[Finding]
    subject: Mapping[str, Any]
    seconds: float

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "failed"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "warning"]

    @property
    def verdict(self) -> Literal["fit", "fit, with warnings", "unfit"]:
        if self.failed:
            return "unfit"
        return "fit, with warnings" if self.warnings else "fit"

    def to_json(self) -> str:
        """One JSON object: verdict, subject, seconds, and the findings in the order of the checks."""
        found = [{k: v for k, v in dataclasses.asdict(f).items() if k != "secondary"} for f in self.findings]
        return json.dumps({"verdict": self.verdict, **self.subject, "seconds": self.seconds, "checks": found}, indent=1)

    def to_text(self) -> str:
        """A line per check, then what is at fault and what to do for each failure and warning, then the verdict."""
        width = max(len(check) for check in CHECKS)
        lines = []
        for finding in self.findings:
            said = (finding.text or "not reached").splitlines()
            first, *more = [part for line in said for part in _wrapped(line)]
            lines.append(f"  {MARKS[finding.status]:<4}  {finding.check:<{width}}  {first}")
            lines += [" " * (width + 10) + line for line in more]
        lines.append("")
        for finding in (*self.failed, *self.warnings):
            lines += [f"{finding.check}: the fault is in {finding.layer}.", f"  What to do: {finding.cure}"]
            if finding.trace:
                lines += ["  " + line for line in finding.trace.rstrip().splitlines()]
        lines.append(f"Verdict: {self.verdict}. {self._meaning} ({self.seconds:.0f} s)")
        return "\n".join(lines)

    @property
    def _meaning(self) -> str:
        if self.failed:
            return "A run with these flags would fail."
        return "A run with these flags can start: replace `doctor` by `train`."


def gather(notes: Mapping[int, Sequence[Mapping[str, Any]]], end: str | None) -> list[Finding]:
    """One finding for each check made on ranks, from what every rank noted.

    :param notes: by rank, in order: ``{"begun": check}`` as a check begins and a finding's fields as it ends.
    :param end: if the ranks failed, how they ended, in a sentence that names the rank.
    """
    findings = [_gather_one(check, notes, end) for check in ON_RANKS]
    if end is None or any(finding.status == "failed" for finding in findings):
        return findings
    place = next((i for i, finding in enumerate(findings) if finding.status == "skipped"), len(findings) - 1)
    findings[place] = _ended(findings[place].check, end)
    return findings


def _gather_one(check: str, notes: Mapping[int, Sequence[Mapping[str, Any]]], end: str | None) -> Finding:
    found = {rank: Finding(**note) for rank, mine in notes.items() for note in mine if note.get("check", None) == check}
    broken = {rank: finding for rank, finding in found.items() if finding.status == "failed"}
    if first_hand := {rank: finding for rank, finding in broken.items() if not finding.secondary}:
        rank, finding = min(first_hand.items())
        return dataclasses.replace(finding, text=f"rank {rank}: {finding.text}")
    begun = any(note.get("begun") == check for mine in notes.values() for note in mine)
    if end is not None and (broken or (begun and len(found) < len(notes))):
        return _ended(check, end)
    if broken:
        return min(broken.items())[1]
    order: Sequence[Status] = ("skipped", "ok", "warning")
    worst = max(found.items(), key=lambda item: (order.index(item[1].status), -item[0]), default=None)
    return Finding(check=check, status="skipped") if worst is None else worst[1]


def _wrapped(line: str) -> list[str]:
    """Broken between words only, so that commands can be copied."""
    return textwrap.wrap(line, TEXT_WIDTH, break_on_hyphens=False, break_long_words=False) or [""]


def _ended(check: str, end: str) -> Finding:
    return Finding(
        check=check,
        status="failed",
        text=end,
        layer=f"a rank that ended during the check {check!r}",
        cure="look for its last output above; a killed rank has usually run out of memory: use a smaller "
        "model, fewer ranks (--nproc_per_node) or a lower --engine_mem_util",
    )
