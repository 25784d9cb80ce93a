"""lightrft-core's version is the API's version: a change that breaks a caller needs a new major version.

Compares the public API of `lightrft.strategy` and `lightrft.utils` with the last release (the newest tag
`lightrft-core-vX.Y.Z`), and the abstract methods of StrategyBase, which every backend in the world implements, with
the list below. Reads the sources without importing them.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import griffe
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parent.parent
CORE = Path("packages/lightrft-core")
MODULES = ("lightrft.strategy", "lightrft.utils")
TAG_PREFIX = "lightrft-core-v"

# Adding to this list breaks every strategy that others wrote: give the new method a default instead.
ABSTRACT_METHODS = frozenset(
    {"setup_distributed", "create_optimizer", "prepare", "backward", "optimizer_step", "save_ckpt", "load_ckpt"}
)


def abstract_methods(source: Path) -> set[str]:
    """List the abstract methods of StrategyBase, from the sources below `source`."""
    base = griffe.load(MODULES[0], search_paths=[source])["strategy_base.StrategyBase"]
    return {name for name, member in base.members.items() if "abstractmethod" in member.labels or _is_abstract(member)}


def _is_abstract(member: griffe.Object | griffe.Alias) -> bool:
    decorators = getattr(member, "decorators", ())
    return any(str(decorator.value).split(".")[-1] == "abstractmethod" for decorator in decorators)


def newest(tags: Iterable[str]) -> str | None:
    """Choose the newest release of core among git tags; pre-releases and other packages' tags do not count."""
    releases = []
    for tag in tags:
        if tag.startswith(TAG_PREFIX):
            try:
                version = Version(tag.removeprefix(TAG_PREFIX))
            except InvalidVersion:
                continue
            if not version.is_prerelease:
                releases.append((version, tag))
    return max(releases)[1] if releases else None


def verdict(breakages: Sequence[str], released: Version, current: Version) -> list[str]:
    """Say which breakages the current version does not allow: all of them, unless its major number has grown."""
    return [] if current.major > released.major else list(breakages)


def breakages(tag: str, root: Path = ROOT) -> list[str]:
    """Describe each public change since `tag` that can break a caller, in the checkout at `root`."""
    found: list[str] = []
    for module in MODULES:
        old = griffe.load_git(module, ref=tag, repo=root, search_paths=[CORE / "src"])
        new = griffe.load(module, search_paths=[root / CORE / "src"])
        explained = (
            change.explain(griffe.ExplanationStyle.ONE_LINE) for change in griffe.find_breaking_changes(old, new)
        )
        found += [re.sub(r"\x1b\[\d*m", "", line) for line in explained]  # griffe colours them
    return found


def main() -> int:
    """Check the working tree and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a tag or commit to compare with; by default core's last release")
    options = parser.parse_args()
    logging.getLogger("griffe").setLevel(logging.ERROR)

    faults: list[str] = []
    found = abstract_methods(ROOT / CORE / "src")
    if found != ABSTRACT_METHODS:
        faults.append(
            f"StrategyBase's abstract methods changed: new {sorted(found - ABSTRACT_METHODS)}, "
            f"gone {sorted(ABSTRACT_METHODS - found)}; every backend is written against the frozen list in {__file__}"
        )
    tags = subprocess.run(["git", "tag", "--list"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    reference = options.against or newest(tags)
    if reference is None:
        sys.stdout.write(f"No tag {TAG_PREFIX}X.Y.Z yet: there is no release to compare the API with.\n")
    else:
        current = Version(tomllib.loads((ROOT / CORE / "pyproject.toml").read_text("utf-8"))["project"]["version"])
        is_release = reference.startswith(TAG_PREFIX)
        released = Version(reference.removeprefix(TAG_PREFIX)) if is_release else current
        refused = verdict(breakages(reference), released, current)
        faults += [f"{fault} (since {reference}; {current} is no new major version)" for fault in refused]
    sys.stderr.writelines(f"{fault}\n" for fault in faults)
    if not faults:
        sys.stdout.write("The API holds.\n")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
