"""Choose the nox sessions that a change needs, as the matrix of the GitHub workflow.

    git diff --name-only main... | python tools/ci_matrix.py

A change to a package runs its own sessions, those of every package whose tests install it, and `integration`, so a
change to core runs them all; so does a change to uv.lock or to what all packages share. A change to documents runs
`lint` alone, unless `contracts` compares them with something.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = {"pyproject.toml", "uv.lock", "noxfile.py", "conftest.py"}
DOCUMENTS = {".md", ".rst", ".png", ".svg"}
ALWAYS = "lint"
# Without a filter of the call's own, nox lists what it would run: neither `api` nor any long session.
LIST = ("-m", "nox", "--list", "--json", "-k", "not nothing")
REPOSITORY_WIDE = {"lint", "types", "contracts", "api", "integration", "vllm_integration"}


def dependents(projects: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """Map each package to the packages whose tests install it, itself included.

    Args:
        projects: for each package's short name (`core`), its parsed pyproject.toml.

    Returns:
        The reverse of the dependencies, extras and test groups, followed to the end.
    """
    needs: dict[str, set[str]] = {}
    for name, project in projects.items():
        requirements = list(project["project"].get("dependencies", []))
        for extra in project["project"].get("optional-dependencies", {}).values():
            requirements += extra
        requirements += [
            entry for entry in project.get("dependency-groups", {}).get("test", []) if isinstance(entry, str)
        ]
        found = {match.group(1) for entry in requirements if (match := re.match(r"lightrft-([\w-]+)", entry))}
        needs[name] = {name, *(found & projects.keys())}
    for middle in projects:
        for name in projects:
            if middle in needs[name]:
                needs[name] |= needs[middle]
    return {name: {other for other in projects if name in needs[other]} for name in projects}


def _is_document(path: str) -> bool:
    pure = PurePosixPath(path)
    return pure.suffix in DOCUMENTS or pure.parts[0] == "docs" or "changelog.d" in pure.parts or pure.name == "LICENSE"


def matrix(
    changed: Iterable[str], sessions: Sequence[Mapping[str, Any]], reverse: Mapping[str, set[str]]
) -> dict[str, list[dict[str, str]]]:
    """Choose the sessions for a set of changed paths.

    Args:
        changed: paths relative to the repository's root, with forward slashes.
        sessions: what `LIST` makes nox print.
        reverse: what `dependents` returns.

    Returns:
        A GitHub Actions matrix, `{"include": [{"session": ..., "name": ...}, ...]}`, in nox's order.
    """
    packages: set[str] = set()
    read_me: set[str] = set()
    names = {ALWAYS}
    for path in changed:
        parts = PurePosixPath(path).parts
        package = parts[1].removeprefix("lightrft-") if len(parts) > 2 and parts[0] == "packages" else ""
        if package in reverse or path == "docs/configuration.md":
            names.add("contracts")  # which holds a package's papers, and that page, against the sources
        if package in reverse and PurePosixPath(path).name == "README.md" and len(parts) == 3:
            read_me.add(package)  # its example is run from the wheel
        elif _is_document(path):
            continue
        elif package in reverse:
            packages |= reverse[package]
            names |= REPOSITORY_WIDE
        elif path in SHARED or path.startswith((".github/", ".ci/", "packages/")):
            packages |= set(reverse)
            names |= REPOSITORY_WIDE
        elif path.startswith("integration/"):
            names |= {"integration", "vllm_integration"}
        else:
            names |= {"types", "contracts"}

    if "engines" in packages:
        names.add("vllm")  # the same tests, on vLLM itself

    def chosen(session: Mapping[str, Any]) -> bool:
        if "default" not in session["tags"] and session["name"] != "api":
            return False
        package = session["call_spec"].get("package")
        if package is None:
            return session["name"] in names
        return package in packages or (package in read_me and session["name"] == "wheels")

    return {
        "include": [
            {"session": session["session"], "name": session["session"]} for session in sessions if chosen(session)
        ]
    }


def main() -> None:
    """Read changed paths from the arguments or, without any, from standard input, and print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="*", help="changed paths, relative to the root; standard input if there are none"
    )
    parser.add_argument("--sessions", type=Path, help="a file with what nox lists as JSON; else nox is asked")
    options = parser.parse_args()
    changed = options.paths or sys.stdin.read().split("\n")
    if options.sessions is not None:
        listed = options.sessions.read_text(encoding="utf-8")
    else:
        listed = subprocess.run([sys.executable, *LIST], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["uv"]["workspace"]
    projects = {
        Path(member).name.removeprefix("lightrft-"): tomllib.loads(
            (ROOT / member / "pyproject.toml").read_text("utf-8")
        )
        for member in workspace["members"]
    }
    chosen = matrix([path for path in changed if path], json.loads(listed), dependents(projects))
    sys.stdout.write(json.dumps(chosen) + "\n")


if __name__ == "__main__":
    main()
