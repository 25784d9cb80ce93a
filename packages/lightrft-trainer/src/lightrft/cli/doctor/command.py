"""The command: make the checks that need no ranks, start ranks for the others, print the verdict."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightrft.strategy.config import FIELDS, StrategyConfig
from lightrft.strategy.errors import ConfigError, LightRFTError
from lightrft.utils import add_arguments

from .findings import BEFORE_RANKS, ON_RANKS, Finding, Report, gather

EXIT_UNFIT = 1
EXIT_WRONG_USE = 2
DESCRIPTION = """\
Check, in about a minute, whether a run with these flags can work on this machine: installed packages, devices, ranks,
a training step, a verified weight sync, generation, the difference between engine and trainer logprobs (also after a
step with learning rate 0), and the memory that sleep frees and wake takes.
"""
EPILOG = """\
Takes the flags of `lightrft train`. Without --pretrain a tiny model is made and used. Exit code: 0 fit (perhaps with
warnings), 1 unfit, 2 wrong use.

  lightrft doctor --fsdp --engine_type vllm
  lightrft doctor --zero_stage 3 --engine_type vllm --engine_tp_size 2 --nproc_per_node 4 --json
  torchrun --nproc-per-node 8 -m lightrft.cli.main doctor --config run.yaml      under your own launcher
"""
# In place of the defaults, which are long for an examination. SGLang's start counts as one of its calls and imports
# everything anew in other processes; ranks that share an engine wait for it.
DEADLINES = {"dist_timeout": 120.0, "engine_timeout": 60.0}
SLOW_STARTS = {"sglang": {"dist_timeout": 360.0, "engine_timeout": 300.0}}


def add_doctor_arguments(parser: argparse.ArgumentParser, add_launch: Callable[[Any], Any]) -> argparse.ArgumentParser:
    """The flags of ``train``, and ``--json``. :param add_launch: adds those that say which ranks to start."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="Print the findings as one JSON object.")
    add_launch(parser)
    return add_arguments(parser, suppress_defaults=True)


def run_doctor(namespace: argparse.Namespace, problems: Sequence[str] = ()) -> int:
    """Examine and report; returns the exit code.

    :param problems: faults found on the command line.
    """
    from ..settings import load_settings

    begun = time.monotonic()
    try:
        if problems:
            raise ConfigError(list(problems))
        config = load_settings(namespace)
        ranks, world = _ranks(namespace)
    except LightRFTError as error:
        sys.stderr.write(f"lightrft: {error}\n")
        return EXIT_WRONG_USE
    config = dataclasses.replace(config, **_deadlines(config), resume=False)
    findings = _before_ranks(config, ranks, world)
    if any(finding.status == "failed" for finding in findings):
        done = {finding.check for finding in findings}
        left = [check for check in (*BEFORE_RANKS, *ON_RANKS) if check not in done]
        findings += [Finding(check=check, status="skipped") for check in left]
    elif "RANK" in os.environ:
        from .rank import examine_as_rank

        findings += examine_as_rank(config)
        if os.environ["RANK"] != "0":
            return 0 if all(finding.status != "failed" for finding in findings) else EXIT_UNFIT
    else:
        findings += _on_ranks(config, namespace)
    subject = {"backend": config.backend, "engine": config.engine_type, "ranks": world}
    report = Report(findings=findings, subject=subject, seconds=round(time.monotonic() - begun, 1))
    sys.stdout.write((report.to_json() if namespace.json else report.to_text()) + "\n")
    return EXIT_UNFIT if report.failed else 0


def _deadlines(config: StrategyConfig) -> dict[str, float]:
    """Deadlines of an examination, for those settings that have their defaults."""
    ours = SLOW_STARTS.get(config.engine_type, DEADLINES)
    return {name: value for name, value in ours.items() if getattr(config, name) == FIELDS[name].default}


def _ranks(namespace: argparse.Namespace) -> tuple[int, int]:
    """Ranks on this node and in all; under the user's own launcher, as the environment says."""
    from ..launch import is_rank, ranks_on_this_node

    if is_rank(os.environ):
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("WORLD_SIZE", "1"))
    ranks = ranks_on_this_node(namespace.nproc_per_node)
    return ranks, ranks * namespace.nnodes


def _before_ranks(config: StrategyConfig, ranks: int, world: int) -> list[Finding]:
    """Findings without ranks; stops where a failure makes the next check impossible."""
    from . import surroundings

    findings = [surroundings.packages(config), surroundings.namespace()]
    if findings[0].status == "failed":
        return findings
    from lightrft.strategy.device import local_device

    findings.append(surroundings.machine(config, ranks))
    return [*findings, surroundings.settings(config, world, local_device().type)]


def _on_ranks(config: StrategyConfig, namespace: argparse.Namespace) -> list[Finding]:
    from ..launch import NodesApartError, describe_failures, launch_folder, run_ranks
    from .notebook import read_notes

    try:
        with launch_folder("lightrft-doctor-") as folder:
            command = ("lightrft.cli.doctor.rank",)
            try:
                failures = run_ranks(config, namespace, folder, command, stopping="the examination ends")
                end = None if failures is None else describe_failures(failures)
            except NodesApartError as error:
                end = str(error)
            return gather(read_notes(folder), end)
    except LightRFTError as error:  # no rank could be started
        return gather({}, str(error))
