"""The command as a user starts it: real ranks, real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightrft.cli.doctor.command import DEADLINES, _deadlines
from lightrft.cli.doctor.findings import CHECKS
from lightrft.cli.main import main
from lightrft.strategy.config import StrategyConfig
from lightrft.testing import RankPool

DOCTOR = ("doctor", "--fsdp", "--engine_type", "hf", "--json")


def assert_fit(written: str) -> None:
    told = json.loads(written)
    assert told["verdict"] == "fit"
    assert (told["backend"], told["engine"], told["ranks"]) == ("fsdp", "hf", 2)
    assert [check["check"] for check in told["checks"]] == list(CHECKS)
    assert all(check["status"] == "ok" for check in told["checks"])


def test_two_ranks_under_a_launcher_are_fit(ranks: RankPool) -> None:
    assert ranks.run(main, DOCTOR) == [0, 0]
    assert_fit(ranks.output(0)[ranks.output(0).index("{") :])  # standard error is there too
    assert "{" not in ranks.output(1)


@pytest.mark.full
def test_ranks_that_the_command_starts_are_fit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightrft.cli.main", *DOCTOR]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_fit(done.stdout)  # nothing else on standard output
    assert list(tmp_path.glob("lightrft*")) == [], "it leaves nothing behind"


def test_a_deadline_that_was_named_stays_and_a_slow_start_gets_time() -> None:
    assert _deadlines(StrategyConfig(engine_type="vllm")) == DEADLINES
    assert _deadlines(StrategyConfig(engine_type="sglang", engine_timeout=5.0)) == {"dist_timeout": 360.0}


def test_what_is_missing_is_told_without_starting_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--engine_type", "nowhere"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL  packages" in shown
    assert "-     ranks        not reached" in shown
    assert "packages: the fault is in the installation." in shown
    assert "Verdict: unfit." in shown


def test_wrong_settings_are_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--temperature", "-1", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    failed = [check for check in told["checks"] if check["status"] == "failed"]
    assert [check["check"] for check in failed] == ["settings"]
    assert "--temperature -1.0" in failed[0]["text"]


def test_a_value_of_a_wrong_type_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("max_steps: many\n")
    assert main(["doctor", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "max_steps" in capsys.readouterr().err
