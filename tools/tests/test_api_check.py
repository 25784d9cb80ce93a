from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

import api_check

ROOT = Path(__file__).parent.parent.parent


def test_the_frozen_list_is_what_strategy_base_asks_of_a_backend() -> None:
    assert api_check.abstract_methods(ROOT / api_check.CORE / "src") == api_check.ABSTRACT_METHODS


def test_abstract_methods_are_found_under_either_spelling(tmp_path: Path) -> None:
    strategy = tmp_path / "lightrft" / "strategy"
    strategy.mkdir(parents=True)
    (strategy / "__init__.py").touch()
    (strategy / "strategy_base.py").write_text(
        "import abc\nfrom abc import abstractmethod\n"
        "class StrategyBase(abc.ABC):\n"
        "    @abstractmethod\n    def one(self): ...\n"
        "    @abc.abstractmethod\n    def two(self): ...\n"
        "    @property\n    @abstractmethod\n    def three(self): ...\n"
        "    def four(self): ...\n"
    )
    assert api_check.abstract_methods(tmp_path) == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], None),
        (["lightrft-fsdp-v1.0.0", "v3", "lightrft-core-vnext"], None),
        (["lightrft-core-v0.9.0", "lightrft-core-v0.10.0", "lightrft-core-v1.0.0rc1"], "lightrft-core-v0.10.0"),
    ],
)
def test_the_newest_release_of_core_is_compared_with(tags: list[str], expected: str | None) -> None:
    assert api_check.newest(tags) == expected


def test_only_a_new_major_version_may_break_callers() -> None:
    assert api_check.verdict(["x"], Version("0.1.0"), Version("0.2.0")) == ["x"]
    assert api_check.verdict(["x"], Version("0.1.0"), Version("1.0.0")) == []
    assert api_check.verdict([], Version("0.1.0"), Version("0.1.0")) == []


def test_a_new_required_argument_is_a_breakage_and_an_optional_one_is_not(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / api_check.CORE / "src" / "lightrft"
    for name in ("strategy", "utils"):
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text("def run(a): ...\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git("tag", "lightrft-core-v0.1.0")
    (source / "utils" / "__init__.py").write_text("def run(a, b=None): ...\n")
    assert api_check.breakages("lightrft-core-v0.1.0", tmp_path) == []
    (source / "strategy" / "__init__.py").write_text("def run(a, b): ...\n")
    (broken,) = api_check.breakages("lightrft-core-v0.1.0", tmp_path)
    assert "run(b)" in broken
