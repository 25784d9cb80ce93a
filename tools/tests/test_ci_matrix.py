from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ci_matrix

ROOT = Path(__file__).parent.parent.parent

PROJECTS = {
    "core": {"project": {"dependencies": ["torch>=2"]}, "dependency-groups": {"test": ["lightrft-testing"]}},
    "fsdp": {
        "project": {"dependencies": ["lightrft-core>=0.1,<1"]},
        "dependency-groups": {"test": ["lightrft-testing"]},
    },
    "testing": {"project": {"dependencies": ["lightrft-core>=0.1,<1"]}},
    "trainer": {
        "project": {
            "dependencies": ["lightrft-core[plots]>=0.1,<1"],
            "optional-dependencies": {"fsdp": ["lightrft-fsdp>=0.1,<1"]},
        },
        "dependency-groups": {"test": ["lightrft-trainer[fsdp]", {"include-group": "other"}]},
    },
}
REVERSE = ci_matrix.dependents(PROJECTS)


def session(name: str, *tags: str, package: str | None = None, rest: str = "") -> dict[str, object]:
    spec = {"package": package} if package else {}
    shown = f"{name}({package}{rest})" if package else name
    return {"session": shown, "name": name, "tags": list(tags), "call_spec": spec}


SESSIONS = [
    session("lint", "default"),
    session("types", "default"),
    session("contracts", "default"),
    session("api", "api"),
    session("integration", "default", "integration"),
    session("integration_full", "full"),
    *(session("tests", "default", "cpu", package=name, rest=", cpu") for name in PROJECTS),
    *(session("tests", "gpu", package=name, rest=", gpu") for name in PROJECTS),
    *(session("wheels", "default", package=name) for name in PROJECTS),
    *(session("full", "full", package=name) for name in PROJECTS),
]


def chosen(*paths: str) -> set[str]:
    return {entry["session"] for entry in ci_matrix.matrix(paths, SESSIONS, REVERSE)["include"]}


def everything() -> set[str]:
    names = {str(entry["session"]) for entry in SESSIONS if "default" in entry["tags"]}  # type: ignore[operator]
    return names | {"api"}


def test_dependents_follow_extras_and_test_groups_to_the_end() -> None:
    assert {
        "core": {"core", "fsdp", "testing", "trainer"},
        "testing": {"core", "fsdp", "testing", "trainer"},
        "fsdp": {"fsdp", "trainer"},
        "trainer": {"trainer"},
    } == REVERSE


@pytest.mark.parametrize(
    "path",
    [
        "packages/lightrft-core/src/lightrft/strategy/config.py",
        "packages/lightrft-core/pyproject.toml",
        "packages/lightrft-new/src/lightrft/new/__init__.py",
        "uv.lock",
        "pyproject.toml",
        "noxfile.py",
        "conftest.py",
        ".ci/run",
        ".github/workflows/ci.yml",
    ],
)
def test_a_change_to_core_or_to_what_all_share_runs_everything(path: str) -> None:
    assert chosen(path) == everything()


def test_a_package_runs_its_own_sessions_and_those_of_packages_whose_tests_install_it() -> None:
    assert chosen("packages/lightrft-fsdp/src/lightrft/fsdp/sharding.py") == {
        *("lint", "types", "contracts", "api", "integration", "wheels(fsdp)", "wheels(trainer)"),
        *("tests(fsdp, cpu)", "tests(trainer, cpu)"),
    }
    assert "tests(fsdp, cpu)" not in chosen("packages/lightrft-trainer/tests/test_losses.py")


@pytest.mark.parametrize("path", ["docs/index.md", "README.md", "LICENSE", "docs/plot.png"])
def test_documents_alone_run_lint(path: str) -> None:
    assert chosen(path) == {"lint"}


@pytest.mark.parametrize("path", ["packages/lightrft-fsdp/CHANGELOG.md", "docs/configuration.md"])
def test_documents_that_a_check_reads_run_that_check(path: str) -> None:
    assert chosen(path) == {"lint", "contracts"}


def test_a_package_readme_runs_its_example_from_the_wheel() -> None:
    assert chosen("packages/lightrft-fsdp/README.md") == {"lint", "contracts", "wheels(fsdp)"}


def test_the_integration_folder_runs_its_own_session() -> None:
    assert chosen("integration/test_switching.py") == {"lint", "integration"}


def test_a_tool_runs_the_repository_wide_checks_only() -> None:
    assert chosen("tools/release.py") == {"lint", "types", "contracts"}


def test_no_change_chooses_gpu_or_long_sessions() -> None:
    assert not {name for name in chosen("uv.lock") if "gpu" in name or "full" in name}


def test_changes_add_up() -> None:
    both = chosen("docs/index.md", "packages/lightrft-trainer/README.md", "tools/release.py")
    assert both == {"lint", "types", "contracts", "wheels(trainer)"}


@pytest.fixture(scope="module")
def real_sessions() -> list[dict[str, Any]]:
    command = [sys.executable, *ci_matrix.LIST]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_the_command_answers_for_this_workspace_with_sessions_that_nox_knows(
    real_sessions: list[dict[str, Any]],
) -> None:
    command = [sys.executable, ROOT / "tools" / "ci_matrix.py"]
    answer = subprocess.run(command, input="uv.lock\n", capture_output=True, text=True, check=True, cwd=ROOT)
    include = json.loads(answer.stdout)["include"]
    expected = [entry["session"] for entry in real_sessions if "default" in entry["tags"] or entry["name"] == "api"]
    assert [entry["session"] for entry in include] == expected
    assert {"tests(core, cpu)", "wheels(trainer)", "lint", "api"} <= set(expected)


def test_what_no_change_chooses_runs_once_a_week_but_for_gpus(real_sessions: list[dict[str, Any]]) -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    sessions, tags = (set(re.findall(rf'"-{option} ([\w.]+)"', workflow)) for option in "st")
    assert "full" in tags
    tags |= {"default", "api", "gpu", "py3.11"}  # a change's own sessions run on 3.11
    unseen = [s["session"] for s in real_sessions if s["name"] not in sessions and not tags & set(s["tags"])]
    assert unseen == []
