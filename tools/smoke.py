"""What must hold for one installed distribution: its files, its plug-ins, its command, and its README's example.

Runs inside the environment that holds the distribution, so it needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path, PurePosixPath

NAMESPACE = "lightrft"


def portions(files: Iterable[str]) -> list[str]:
    """Name the import packages that a distribution's files make, such as `lightrft.fsdp`."""
    names = {".".join(PurePosixPath(file).parts[:2]) for file in files if file.startswith(f"{NAMESPACE}/")}
    return sorted(names)


def file_faults(files: Iterable[str]) -> list[str]:
    """Say what is wrong with a wheel's list of files."""
    files = list(files)
    faults = []
    if f"{NAMESPACE}/__init__.py" in files:
        faults.append(f"it owns {NAMESPACE}/__init__.py, which hides every other distribution's part of the namespace")
    for file in files:
        if file.startswith(f"{NAMESPACE}/") and len(PurePosixPath(file).parts) == 2:
            faults.append(f"{file} lies in the namespace itself, which belongs to no distribution")
    for portion in portions(file for file in files if len(PurePosixPath(file).parts) > 2):
        if f"{portion.replace('.', '/')}/py.typed" not in files:
            faults.append(f"{portion} has no py.typed, so that type checkers ignore its annotations")
    if not any(PurePosixPath(file).name == "LICENSE" for file in files):
        faults.append("it carries no LICENSE")
    return faults


def requirement_faults(distribution: str, requires: Iterable[str]) -> list[str]:
    """Say which of a distribution's requirements break the rule: core for all, siblings only through an extra."""
    faults = []
    for requirement in requires:
        matched = re.match(r"(lightrft-\w+)", requirement)
        if matched is None or matched.group(1) == "lightrft-core":
            continue
        if matched.group(1) == "lightrft-testing":
            faults.append(f"{requirement!r}: nothing published depends on lightrft-testing; use the test group")
        elif "extra ==" not in requirement:
            faults.append(f"{requirement!r}: {distribution} may reach a sibling through an extra only")
    return faults


def python_blocks(markdown: str) -> list[str]:
    """Cut the Python examples out of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)


def check_imports(distribution: str) -> list[str]:
    """Check the files of an installed distribution and import every package that it brings."""
    installed = metadata.distribution(distribution)
    files = [file.as_posix() for file in installed.files or []]
    faults = file_faults(files) + requirement_faults(distribution, installed.requires or [])
    for portion in portions(files):
        importlib.import_module(portion)
    namespace = importlib.util.find_spec(NAMESPACE)
    if namespace is None or namespace.origin is not None:
        faults.append(f"{NAMESPACE} is no namespace package: {namespace and namespace.origin} shadows it")
    for point in installed.entry_points:
        if point.group == "console_scripts":
            command = Path(sysconfig.get_path("scripts"), point.name)
            answer = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120)
            if answer.returncode != 0 or "usage" not in answer.stdout.lower():
                faults.append(f"`{point.name} --help` answers {answer.returncode}: {answer.stderr or answer.stdout}")
            continue
        try:
            point.load()
        except (ImportError, AttributeError) as error:
            # Without its extra a plug-in may be unable to load, but it says what to install.
            if "pip install" not in str(error):
                faults.append(
                    f"entry point {point.name!r} of {point.group} fails without saying what to install: {error}"
                )
    return faults


def check_readme(distribution: str, readme: Path) -> list[str]:
    """Run a README's Python examples, those that define tests with pytest."""
    blocks = python_blocks(readme.read_text(encoding="utf-8"))
    if not blocks:
        return [f"{readme} shows no Python example"]
    faults = []
    for number, block in enumerate(blocks, start=1):
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, f"test_readme_{number}.py")
            script.write_text(block, encoding="utf-8")
            runner = ["-m", "pytest", "-q"] if re.search(r"^class Test", block, flags=re.MULTILINE) else []
            answer = subprocess.run(
                [sys.executable, "-P", *runner, script], cwd=folder, capture_output=True, text=True, timeout=300
            )
            sys.stdout.write(answer.stdout)
            if answer.returncode != 0:
                faults.append(f"example {number} of {readme} fails:\n{answer.stdout}{answer.stderr}")
    return faults


def main() -> int:
    """Check one distribution and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distribution", help="such as lightrft-core")
    parser.add_argument("--imports", action="store_true", help="check its files, imports, plug-ins and command")
    parser.add_argument("--readme", type=Path, help="run this page's Python examples")
    options = parser.parse_args()
    with ThreadPoolExecutor() as beside:  # examples are processes of their own, and both mostly import
        examples = beside.submit(check_readme, options.distribution, options.readme) if options.readme else None
        faults = check_imports(options.distribution) if options.imports else []
        faults += examples.result() if examples else []
    for fault in faults:
        sys.stderr.write(f"{options.distribution}: {fault}\n")
    if not faults:
        sys.stdout.write(f"{options.distribution} {metadata.version(options.distribution)}: sound\n")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
