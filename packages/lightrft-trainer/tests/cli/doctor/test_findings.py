from __future__ import annotations

import json
from typing import Any

from lightrft.cli.doctor.findings import BEFORE_RANKS, ON_RANKS, Finding, Report, gather


def begun(check: str) -> dict[str, Any]:
    return {"begun": check}


def noted(check: str, **fields: Any) -> dict[str, Any]:
    return {"check": check, "text": f"{check} is well", **fields}


def healthy(*checks: str) -> list[dict[str, Any]]:
    return [note for check in checks for note in (begun(check), noted(check))]


def report(*findings: Finding) -> Report:
    return Report(findings=findings, subject={"backend": "fsdp", "engine": "hf", "ranks": 2}, seconds=12.34)


def test_every_check_on_ranks_has_a_finding_even_where_nobody_came_so_far() -> None:
    findings = gather({0: healthy("ranks"), 1: healthy("ranks")}, None)
    assert [finding.check for finding in findings] == list(ON_RANKS)
    assert [finding.status for finding in findings] == ["ok", *["skipped"] * (len(ON_RANKS) - 1)]


def test_the_rank_at_fault_is_told_not_those_that_heard_of_it() -> None:
    heard = noted("engine", status="failed", text="rank 1: out of memory", secondary=True)
    first_hand = noted("engine", status="failed", text="out of memory")
    findings = gather({0: [begun("engine"), heard], 1: [begun("engine"), first_hand]}, "rank 0 ended")
    assert findings[ON_RANKS.index("engine")].text == "rank 1: out of memory"


def test_a_rank_that_was_killed_in_a_check_fails_that_check() -> None:
    waited = noted("engine", status="failed", text="rank 1 is silent", secondary=True)
    notes = {0: [*healthy("ranks"), begun("engine"), waited], 1: [*healthy("ranks"), begun("engine")]}
    finding = gather(notes, "rank 1 was killed by SIGKILL")[ON_RANKS.index("engine")]
    assert (finding.status, finding.text) == ("failed", "rank 1 was killed by SIGKILL")
    assert "'engine'" in finding.layer


def test_ranks_that_ended_without_a_note_never_look_well() -> None:
    for notes in ({}, {0: healthy(*ON_RANKS)}, {0: healthy("ranks", "training")}):
        findings = gather(notes, "rank 0 ended with exit code 7")
        assert [finding.text for finding in findings if finding.status == "failed"] == ["rank 0 ended with exit code 7"]


def test_a_warning_of_any_rank_is_kept() -> None:
    findings = gather({0: healthy("sleep"), 1: [begun("sleep"), noted("sleep", status="warning")]}, None)
    assert findings[ON_RANKS.index("sleep")].status == "warning"


def test_verdicts() -> None:
    well, warned = (
        Finding(check="ranks"),
        Finding(check="sleep", status="warning", layer="the engine", cure="sleep not"),
    )
    failed = Finding(check="drift", status="failed", text="it drifts", layer="the engine", cure="give it one dtype")
    assert report(well).verdict == "fit"
    assert report(well, warned).verdict == "fit, with warnings"
    assert report(well, warned, failed).verdict == "unfit"


def test_the_text_ends_in_a_verdict_with_layer_and_cure() -> None:
    failed = Finding(
        check="drift", status="failed", text="it drifts", layer="the engine 'hf'", cure="give it one dtype"
    )
    lines = report(Finding(check="ranks", text="2 joined"), failed, Finding(check="sleep", status="skipped")).to_text()
    assert lines.splitlines() == [
        "  ok    ranks        2 joined",
        "  FAIL  drift        it drifts",
        "  -     sleep        not reached",
        "",
        "drift: the fault is in the engine 'hf'.",
        "  What to do: give it one dtype",
        "Verdict: unfit. A run with these flags would fail. (12 s)",
    ]


def test_long_findings_are_wrapped_under_themselves() -> None:
    lines = report(Finding(check="ranks", text="word " * 50)).to_text().splitlines()[:3]
    assert all(len(line) < 120 for line in lines)
    assert lines[1].startswith(" " * 21 + "word")


def test_json_says_the_same() -> None:
    failed = Finding(check="drift", status="failed", text="it drifts", layer="l", cure="c", figures={"mean": 0.5})
    told = json.loads(report(failed).to_json())
    assert {key: told[key] for key in ("verdict", "backend", "engine", "ranks", "seconds")} == {
        "verdict": "unfit",
        "backend": "fsdp",
        "engine": "hf",
        "ranks": 2,
        "seconds": 12.34,
    }
    assert told["checks"][0]["figures"] == {"mean": 0.5}
    assert set(told["checks"][0]) == {"check", "status", "text", "layer", "cure", "figures", "trace"}


def test_no_check_is_made_twice() -> None:
    assert not set(BEFORE_RANKS) & set(ON_RANKS)
