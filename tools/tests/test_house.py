"""The rules of the house: what keeps several distributions under one namespace, and the files that must agree."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import release
import smoke

ROOT = Path(__file__).parent.parent.parent
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MEMBERS = [ROOT / member for member in WORKSPACE["tool"]["uv"]["workspace"]["members"]]
PROJECTS = {member.name: tomllib.loads((member / "pyproject.toml").read_text("utf-8")) for member in MEMBERS}

# Where an accelerator's vendor must be named.
MAY_NAME_CUDA = {"packages/lightrft-core/src/lightrft/strategy/device.py"}

each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)


def modules_of(member: Path) -> list[str]:
    names = PROJECTS[member.name]["tool"]["uv"]["build-backend"]["module-name"]
    return [names] if isinstance(names, str) else names


def our_files() -> Iterator[Path]:
    """List the files that git tracks or would, as they lie here."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return (ROOT / path for path in listed.splitlines() if (ROOT / path).is_file())


@each_member
def test_the_namespace_holds_no_file_and_every_portion_is_declared_and_typed(member: Path) -> None:
    namespace = member / "src" / "lightrft"
    entries = [path for path in namespace.iterdir() if path.name != "__pycache__"]
    assert [path for path in entries if not path.is_dir()] == []
    declared = {name.removeprefix("lightrft.") for name in modules_of(member)}
    assert {path.name for path in entries} == declared
    assert [name for name in declared if not (namespace / name / "py.typed").is_file()] == []


def test_every_portion_belongs_to_one_distribution() -> None:
    owners = Counter(name for member in MEMBERS for name in modules_of(member))
    assert [name for name, count in owners.items() if count > 1] == []


def test_every_folder_of_packages_is_a_member_and_known_to_the_shared_configuration() -> None:
    folders = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    assert folders == set(PROJECTS)
    assert folders == set(WORKSPACE["tool"]["uv"]["sources"])
    assert {Path(path).parent.name for path in WORKSPACE["tool"]["pyright"]["extraPaths"]} == folders


def test_pyright_is_given_folders_that_exist() -> None:
    included = WORKSPACE["tool"]["pyright"]["include"]
    assert [path for path in included if not (ROOT / path).exists()] == []
    assert {"packages", "tools"} <= set(included)


def test_the_import_contracts_name_every_portion() -> None:
    contracts = {contract["id"]: contract for contract in WORKSPACE["tool"]["importlinter"]["contracts"]}
    of = {member.name: set(modules_of(member)) for member in MEMBERS}
    core, trainer = of["lightrft-core"], of["lightrft-trainer"]
    others = set().union(*of.values()) - core
    assert set(contracts["core"]["source_modules"]) == core
    assert others <= set(contracts["core"]["forbidden_modules"])
    assert set(contracts["siblings"]["modules"]) == others - trainer
    assert set(contracts["trainer"]["source_modules"]) == trainer
    assert others - trainer <= set(contracts["trainer"]["forbidden_modules"])
    assert set(contracts["below-trainer"]["source_modules"]) == others - trainer
    assert set(contracts["below-trainer"]["forbidden_modules"]) == trainer


@each_member
def test_requirements_reach_core_in_its_major_version_and_siblings_through_extras_only(member: Path) -> None:
    project = PROJECTS[member.name]["project"]
    extras = project.get("optional-dependencies", {})
    written = [
        *project["dependencies"],
        *(f'{entry} ; extra == "{extra}"' for extra, entries in extras.items() for entry in entries),
    ]
    assert smoke.requirement_faults(member.name, written) == []
    if member.name == "lightrft-core":
        return
    core = Version(PROJECTS["lightrft-core"]["project"]["version"])
    (on_core,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "lightrft-core")
    assert on_core.specifier.contains(core)
    assert not on_core.specifier.contains(Version(f"{core.major + 1}.0.0"))


@each_member
def test_a_package_carries_its_own_papers(member: Path) -> None:
    assert (member / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    readme = (member / "README.md").read_text("utf-8")
    assert f"pip install {member.name}" in readme.replace('"', "")
    assert smoke.python_blocks(readme)
    assert "<!-- towncrier release notes start -->" in (member / "CHANGELOG.md").read_text("utf-8")
    release.fragment_kinds(path.name for path in (member / "changelog.d").glob("[!.]*"))
    configured = PROJECTS[member.name]["tool"]["towncrier"]
    assert configured["name"] == member.name
    assert tuple(kind["directory"] for kind in configured["type"]) == release.KINDS


def test_no_test_folder_is_a_package() -> None:
    """A source tree that tests install (``tests/NAME/src``) is one, of course."""
    packages = [path for path in our_files() if "tests" in path.parts and path.name == "__init__.py"]
    assert [str(path) for path in packages if "src" not in path.parts[path.parts.index("tests") :]] == []


def test_only_the_lock_names_package_registries() -> None:
    lock = (ROOT / "uv.lock").read_text("utf-8")
    hosts = set(re.findall(r'https://([^/"]+)/', lock))
    assert hosts
    anyone = re.compile("|".join(re.escape(host) for host in hosts))
    guilty = []
    for path in our_files():
        if path != ROOT / "uv.lock" and anyone.search(path.read_text("utf-8", errors="ignore")):
            guilty.append(str(path.relative_to(ROOT)))
    assert guilty == []


def cuda_literals(source: str) -> list[int]:
    """Find the lines that name CUDA in code: "cuda", "cuda:0", torch.cuda; a list of devices beside "cpu" is data."""
    lines = []
    declared: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            if any(isinstance(item, ast.Constant) and item.value == "cpu" for item in node.elts):
                declared.update(node.elts)
        if node in declared:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"cuda(:\d+)?$", node.value):
            lines.append(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            lines.append(node.lineno)
    return sorted(lines)


def test_a_cuda_literal_is_recognised() -> None:
    assert cuda_literals('x = "cuda"\ny = torch.cuda.is_available()\nz = "cuda:0"\nw = "cudagraph"\n') == [1, 2, 3]
    assert cuda_literals('devices = ("cpu", "cuda")\n') == []


def test_no_published_code_names_cuda_but_the_device_module() -> None:
    guilty = []
    for path in ROOT.glob("packages/*/src/**/*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name not in MAY_NAME_CUDA:
            guilty += [f"{name}:{line}" for line in cuda_literals(path.read_text("utf-8"))]
    assert guilty == []
