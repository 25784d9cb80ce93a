"""Prepare the release of one package: version, changelog and lock; then say which git commands publish it.

    uv run python tools/release.py core             # the version that the changelog fragments call for
    uv run python tools/release.py core --dry-run

A `breaking` fragment asks for a new major version, a `feature` for a new minor one, anything else for a patch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
KINDS = ("breaking", "feature", "fix", "misc")


def fragment_kinds(names: Iterable[str]) -> set[str]:
    """Read the kinds off the names of changelog fragments, such as `+resume.feature.md`.

    Raises:
        ValueError: a fragment's name holds no known kind.
    """
    kinds = set()
    for name in names:
        parts = name.split(".")
        kind = parts[1] if len(parts) >= 3 else None
        if kind not in KINDS:
            raise ValueError(
                f"changelog fragment {name!r} names no kind: call it +SUBJECT.KIND.md, KIND one of {KINDS}"
            )
        kinds.add(kind)
    return kinds


def next_version(current: Version, kinds: set[str], *, released: bool) -> Version:
    """Decide the version that a set of fragments calls for.

    Args:
        current: the version in pyproject.toml.
        kinds: what `fragment_kinds` returned.
        released: whether `current` has a tag; a first release keeps the version that it was written with.

    Raises:
        ValueError: there is nothing to release.
    """
    if not kinds:
        raise ValueError("no changelog fragment, so nothing to release: add one under changelog.d")
    if not released:
        return current
    major, minor, micro = current.major, current.minor, current.micro
    if "breaking" in kinds:
        return Version(f"{major + 1}.0.0")
    if "feature" in kinds:
        return Version(f"{major}.{minor + 1}.0")
    return Version(f"{major}.{minor}.{micro + 1}")


def left_behind(version: Version, requirements: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Map each package whose requirement on lightrft-core excludes `version` to that requirement."""
    behind = {}
    for package, entries in requirements.items():
        for requirement in map(Requirement, entries):
            if requirement.name == "lightrft-core" and not requirement.specifier.contains(version):
                behind[package] = str(requirement)
    return behind


def with_version(pyproject: str, version: Version) -> str:
    """Return a pyproject.toml's text with another project version."""
    return re.sub(r'^version = "[^"]*"$', f'version = "{version}"', pyproject, count=1, flags=re.MULTILINE)


def main() -> None:
    """Prepare one package's release in the working tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="such as core")
    parser.add_argument("--version", type=Version, help="another version than the fragments call for")
    parser.add_argument("--dry-run", action="store_true", help="show the version and the changelog, change nothing")
    options = parser.parse_args()

    folder = ROOT / "packages" / f"lightrft-{options.package}"
    text = (folder / "pyproject.toml").read_text("utf-8")
    current = Version(tomllib.loads(text)["project"]["version"])
    tag = f"lightrft-{options.package}-v"
    tags = subprocess.run(["git", "tag", "--list"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    kinds = fragment_kinds(path.name for path in (folder / "changelog.d").glob("[!.]*"))
    version = options.version or next_version(current, kinds, released=f"{tag}{current}" in tags)

    towncrier = [sys.executable, "-m", "towncrier", "build", "--dir", str(folder), "--version", str(version)]
    if options.dry_run:
        subprocess.run([*towncrier, "--draft"], check=True)
        return
    (folder / "pyproject.toml").write_text(with_version(text, version), encoding="utf-8")
    subprocess.run([*towncrier, "--yes"], check=True)
    subprocess.run([os.environ.get("UV", "uv"), "lock"], cwd=ROOT, check=True)

    if options.package == "core":
        projects = {
            path.parent.name: tomllib.loads(path.read_text("utf-8")) for path in ROOT.glob("packages/*/pyproject.toml")
        }
        ranges = {name: project["project"].get("dependencies", []) for name, project in projects.items()}
        for package, requirement in left_behind(version, ranges).items():
            sys.stdout.write(f"{package} asks for {requirement}: port it, then widen the range and release it too.\n")
    name = f"lightrft-{options.package}"
    sys.stdout.write(
        f"Look at the diff, run `uv run nox` and `uv run nox -s api`, then:\n"
        f'  git commit -am "{name} {version}" && git tag {tag}{version}\n'
        f"  uv build --package {name} --clear && uv publish dist/*\n"
    )


if __name__ == "__main__":
    main()
