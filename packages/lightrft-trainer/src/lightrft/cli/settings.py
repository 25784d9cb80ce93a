"""From command line, preset, file and earlier run to one checked configuration, without loading torch."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightrft.data.paths import fault_of_file, fault_of_folder
from lightrft.strategy.config import FIELDS, StrategyConfig, read_yaml
from lightrft.strategy.errors import ConfigError

from .run_checks import run_faults

DEFAULT_PRESET = "default"
CONFIG_FILE = "config.yaml"
# What a switch imports on the ranks, and what to do if it is not installed.
PACKAGES = {
    "flash_attn": ("flash_attn", "pip install flash-attn, or drop the flag (SDPA is used)"),
    "use_tensorboard": ("tensorboard", 'pip install "lightrft-trainer[tensorboard]"'),
    "use_wandb": ("wandb", 'pip install "lightrft-trainer[wandb]"'),
    "use_trackio": ("trackio", 'pip install "lightrft-trainer[trackio]"'),
}
# Settings that name folders. Those of --prompt_data and --eval_data are expanded where they are read.
FOLDERS = ("pretrain", "critic_pretrain", "reward_pretrain", "output_dir", "log_dir")
TAKEN = "already holds a run; add --resume to continue it, or name another folder"


def preset_names() -> list[str]:
    """Presets that come with the package, sorted."""
    folder = resources.files("lightrft.cli") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's settings.

    :raises ConfigError: no such preset; the known ones are named.
    """
    if name not in preset_names():
        raise ConfigError([f"--preset {name}: no such preset; there are {', '.join(preset_names())}"])
    with resources.as_file(resources.files("lightrft.cli") / "presets" / f"{name}.yaml") as path:
        return read_yaml(path)


def preset_title(name: str) -> str:
    """The first sentence of a preset's opening comment."""
    text = (resources.files("lightrft.cli") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
    return comment.split(". ")[0].rstrip(".") + "."


def merge_settings(
    *,
    typed: Mapping[str, Any],
    file: Mapping[str, Any],
    preset: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Preset, then the saved run's settings, then the file's, then what was typed: the later wins.

    The choice of a backend replaces an earlier one: ``zero_stage`` or ``strategy`` without ``fsdp`` drops a preset's
    ``fsdp``. A preset's engine runs on one rank, so an ``engine_tp_size`` above 1 drops it.
    """
    merged = dict(saved) if saved is not None else dict(preset)
    given = {**file, **typed}
    if saved is None and str(given.get("engine_tp_size", 1)) != "1" and "engine_type" not in given:
        merged.pop("engine_type", None)
    for layer in (file, typed):
        if ("zero_stage" in layer or "strategy" in layer) and "fsdp" not in layer:
            merged.pop("fsdp", None)
        merged.update(layer)
    return merged


def chosen_preset(name: str | None, *, typed: Mapping[str, Any], file: Mapping[str, Any]) -> str | None:
    """The preset to start from: the one asked for, or the default where neither a model nor data is named."""
    if name is not None:
        return name
    named = {**file, **typed}
    return None if named.get("pretrain") or named.get("prompt_data") else DEFAULT_PRESET


def load_settings(namespace: argparse.Namespace) -> StrategyConfig:
    """The configuration of a run, converted but not yet checked.

    :raises ConfigError: a file or preset that cannot be read, values of a wrong type, nothing to resume.
    """
    typed = _at_home({name: value for name, value in vars(namespace).items() if name in FIELDS})
    file = _at_home(read_yaml(namespace.config)) if namespace.config else {}
    name = chosen_preset(namespace.preset, typed=typed, file=file)
    preset = read_preset(name) if name is not None else {}
    merged = merge_settings(typed=typed, file=file, preset=preset)
    if merged.get("resume"):
        merged = _resumed(merged, typed=typed, file=file)
    try:
        return StrategyConfig.from_args(merged)
    except ConfigError:
        StrategyConfig(**merged).checked()  # raises with these faults and the other settings' own
        raise


def _at_home(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with ``~`` expanded, which a shell does neither in a file nor in ``--flag=~/folder``."""
    expanded = {name: os.path.expanduser(value) for name in FOLDERS if isinstance(value := given.get(name), str)}
    if several := expanded.get("reward_pretrain"):
        expanded["reward_pretrain"] = ",".join(os.path.expanduser(part.strip()) for part in several.split(","))
    return {**given, **expanded}


def _resumed(merged: Mapping[str, Any], *, typed: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """The saved run's settings, overridden by what is given now; a run that ended early may have saved none."""
    folder = Path(merged.get("output_dir", FIELDS["output_dir"].default))
    if (fault := fault_of_folder(folder)) is not None:
        said = "does not exist" if fault == "no such folder" else f"cannot be read: {fault}"
        raise ConfigError([f"--resume: {folder} {said}; name a run's folder with --output_dir, or drop --resume"])
    if os.path.isfile(folder / CONFIG_FILE):
        merged = merge_settings(typed=typed, file=file, preset={}, saved=read_yaml(folder / CONFIG_FILE))
    return {**merged, "output_dir": str(folder), "resume": True}


def check_settings(config: StrategyConfig, *, multimodal: bool, world_size: int | None = None) -> StrategyConfig:
    """Every fault that can be found before a rank starts, all at once.

    :raises ConfigError: the faults of the settings and of what they name: files, backend, engine, output folder.
    """
    problems: list[str] = []
    checked = config
    try:
        checked = config.checked(world_size)
    except ConfigError as error:
        problems += error.problems
    problems += run_faults(config, multimodal=multimodal, world_size=world_size)
    problems += _installation_faults(config) + _file_faults(config) + _reward_faults(config) + _output_faults(config)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return checked


def _installation_faults(config: StrategyConfig) -> list[str]:
    from lightrft.strategy.errors import PluginError
    from lightrft.strategy.registry import Kind, available, load_plugin

    problems = [
        f"--{flag}: {package} is not installed; {cure}"
        for flag, (package, cure) in PACKAGES.items()
        if getattr(config, flag) and not _installed(package)
    ]
    wanted: list[tuple[Kind, str]] = [("strategies", config.backend), ("engines", config.engine_type)]
    if config.rm_use_engine:
        wanted.append(("scoring_engines", config.engine_type))
    for kind, name in wanted:
        if name in available(kind):
            continue  # loading it would load torch; a plug-in that is installed but broken says so when the ranks start
        try:
            load_plugin(kind, name)
        except PluginError as error:
            problems.append(str(error))
    return problems


def _installed(package: str) -> bool:
    """A folder of that name, such as the one that wandb leaves where it ran, does not count."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def _file_faults(config: StrategyConfig) -> list[str]:
    problems = []
    models = [("pretrain", config.pretrain), ("critic_pretrain", config.critic_pretrain)]
    for flag, value in [*models, *(("reward_pretrain", name) for name in config.reward_names)]:
        looks_local = value is not None and (value.startswith((".", "/", "~")) or value.count("/") > 1)
        fault = fault_of_folder(os.path.expanduser(value)) if value is not None and (looks_local or not value) else None
        if fault is not None:
            problems.append(f"--{flag} {value!r}: {fault}; give a model's folder or a hub name such as org/model")
    for flag in ("prompt_data", "eval_data"):
        for source in map(str.strip, (getattr(config, flag) or "").split(",")):
            fault = fault_of_file(os.path.expanduser(source))
            if fault is not None and source.endswith((".json", ".jsonl", ".parquet")):
                problems.append(f"--{flag} {source!r}: {fault}")
    return problems


def _reward_faults(config: StrategyConfig) -> list[str]:
    """A misspelt rule, a module that is not there, a function of the wrong shape."""
    if not config.reward and not config.remote_rm_url:
        return []
    from lightrft.rewards import RewardError, build_reward

    try:
        build_reward(config.reward, remote_urls=config.remote_rm_url, timeout=max(config.reward_timeout, 1e-3))
    except RewardError as error:
        text = str(error)
        return [text if text.startswith("--") else f"--reward: {text}"]
    return []


def _output_faults(config: StrategyConfig) -> list[str]:
    given = {"output_dir": config.output_dir, "log_dir": config.log_dir}
    found = {name: _output_fault(Path(path)) for name, path in given.items() if path is not None}
    problems = [f"--{name} {fault}" for name, fault in found.items() if fault is not None]
    own = config.output_dir != FIELDS["output_dir"].default and not config.resume
    if own and os.path.exists(Path(config.output_dir) / CONFIG_FILE):
        problems.append(f"--output_dir {config.output_dir!r}: {TAKEN}")
    return problems


def _output_fault(path: Path) -> str | None:
    try:
        str(path).encode()
        os.stat(path)
    except UnicodeEncodeError:  # TensorBoard and YAML take only text
        encoding = sys.getfilesystemencoding()
        return f"{str(path)!r}: is no text in {encoding}; name another folder, or set LC_ALL=C.UTF-8 if it is in UTF-8"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return f"{str(path)!r}: {os.strerror(error.errno).lower()}; name another folder"
    there = next((place for place in (path, *path.parents) if os.path.exists(place)), Path())
    if not os.path.isdir(there):
        return f"{str(there)!r}: is a file; name a folder"
    if not os.access(there, os.W_OK):
        return f"{str(path)!r}: nothing may be written into {there}; name another folder"
    return None
