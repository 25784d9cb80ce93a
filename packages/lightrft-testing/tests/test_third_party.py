"""Somebody else's strategy and engine: a real distribution beside ours, found through its entry points."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "third_party"
# Each of what a backend must have, once; `-m full` runs the suites whole.
SUBSET = (
    "TestParrot or test_either_order or test_gradients_equal_those_of_one_process[1-qwen3_moe] or not_finite or "
    "(bit_for_bit and qwen2_tied) or (own_order and fake-uneven) or (gives_a_receipt and fake and full) or "
    "saved_position or filled_later"
)


def install(target: Path, source: Path) -> None:
    """Build a distribution and install it, and nothing that it depends on, into a folder."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("these tests build and install a distribution: pip install uv")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(target)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def python(target: Path, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that also sees ``target``."""
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture(scope="module")
def ringworld(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install(target, copy_of_source(tmp_path_factory.mktemp("source")))
    return target


def package(folder: Path, name: str, *, strategy: str = "ring", core: str = ">=0.1,<1") -> Path:
    """The source of a distribution that brings a strategy of some name, for some range of core."""
    module = name.replace("-", "_")
    (folder / "src" / module).mkdir(parents=True)
    (folder / "src" / module / "__init__.py").write_text("class Strategy: ...\n")
    (folder / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["uv_build>=0.11,<1"]
build-backend = "uv_build"
[project]
name = "{name}"
version = "1.5"
dependencies = ["lightrft-core{core}"]
[project.entry-points."lightrft.strategies"]
{strategy} = "{module}:Strategy"
"""
    )
    return folder


def load_error(target: Path, name: str) -> str:
    """What asking for a strategy says."""
    code = f"from lightrft.strategy import get_strategy\nget_strategy({{'strategy': {name!r}}})"
    done = python(target, "-c", code)
    assert done.returncode == 1, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_an_installed_plug_in_passes_the_suites(ringworld: Path, tmp_path: Path) -> None:
    checks = shutil.copy(SOURCE / "checks" / "ringworld_checks.py", tmp_path)
    done = python(
        ringworld, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks), "-k", SUBSET, "-m", "not full"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    passed = re.search(r"(\d+) passed.* 1 xfailed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) > 40


@pytest.mark.full
def test_an_installed_plug_in_passes_the_suites_whole(ringworld: Path, tmp_path: Path) -> None:
    checks = shutil.copy(SOURCE / "checks" / "ringworld_checks.py", tmp_path)
    done = python(ringworld, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks), timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr


def test_it_is_found_by_name_and_listed(ringworld: Path) -> None:
    code = (
        "from lightrft.strategy import get_strategy\n"
        "from lightrft.strategy.registry import available\n"
        "print(type(get_strategy({'strategy': 'ring'})).__name__, available('strategies'), available('engines'))"
    )
    done = python(ringworld, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RingStrategy [")
    assert "'fake'" in done.stdout
    assert "'parrot'" in done.stdout


def test_a_missing_name_is_answered_with_what_is_installed(ringworld: Path) -> None:
    message = load_error(ringworld, "rung")
    assert "--strategy rung: no such strategy is installed" in message
    assert "ring" in message.split("installed:")[1]


def test_two_distributions_with_one_name_are_both_named(ringworld: Path, tmp_path: Path) -> None:
    install(tmp_path / "target", copy_of_source(tmp_path))
    install(tmp_path / "target", package(tmp_path / "other", "other-ring"))
    message = load_error(tmp_path / "target", "ring")
    assert "ringworld 2.3" in message
    assert "other-ring 1.5" in message
    assert "uninstall one" in message


def test_a_plug_in_for_another_core_is_refused_with_both_versions(tmp_path: Path) -> None:
    from importlib.metadata import version

    install(tmp_path / "target", package(tmp_path / "future", "future-ring", strategy="future", core=">=9,<10"))
    message = load_error(tmp_path / "target", "future")
    assert "future-ring 1.5" in message
    assert "<10,>=9" in message or ">=9,<10" in message
    assert version("lightrft-core") in message


def copy_of_source(folder: Path) -> Path:
    """Building writes beside the sources, which must stay clean; and no folder of ours below tests is a package."""
    copy = Path(shutil.copytree(SOURCE, folder / "ringworld"))
    (copy / "src" / "ringworld" / "__init__.py").touch()
    return copy
