"""Start this node's ranks with torch's elastic launcher, wait for them, and report in one sentence what went wrong.

A rank is ``python -m lightrft.cli.worker``. Parent and ranks share a folder: the parent writes the settings there, the
ranks their process ids (so that the parent can forward Ctrl-C) and their outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightrft.strategy.config import FIELDS, StrategyConfig
from lightrft.strategy.errors import ConfigError, LightRFTError

from .settings import CONFIG_FILE, check_settings

EXIT_FAILED = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
CPU_RANKS = 2
LAUNCH_DIR = "LIGHTRFT_LAUNCH_DIR"
ASKED_FILE = "signal"  # in that folder: the user has asked the run to stop
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # which torch reads
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANDLER_SECONDS = 1.0  # in which a handler runs, unless a library waits


class NodesApartError(LightRFTError):
    """The launchers of a run's nodes do not reach each other."""


def launch(config: StrategyConfig, options: argparse.Namespace, *, multimodal: bool) -> int:
    """Run the training on this node's ranks and return the command's exit code.

    Under torchrun (or anything else that sets RANK) this process is a rank itself, and starts none.

    :raises ConfigError: settings that do not fit the number of ranks.
    """
    if is_rank(os.environ):
        from .worker import run_rank

        return run_rank(config, multimodal=multimodal)
    ranks = ranks_on_this_node(options.nproc_per_node)
    config = check_settings(config, multimodal=multimodal, world_size=ranks * options.nnodes)
    if config.output_dir != FIELDS["output_dir"].default:
        try:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # from now on --resume knows it
        except OSError as error:
            text = f"--output_dir {config.output_dir!r}: cannot be made: {error.strerror}; name another folder"
            raise ConfigError([text]) from error
    with launch_folder("lightrft-") as folder:
        command = ("lightrft.cli.worker", *(["--multimodal"] if multimodal else []))
        stopping, apart = "the ranks finish their step and write a checkpoint", None
        try:
            failures = run_ranks(config, options, folder, command, stopping=stopping)
        except NodesApartError as error:
            failures, apart = {}, str(error)
        return _report(folder, failures, options, apart=apart)


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether a launcher such as torchrun has started this process as one of its ranks.

    :raises ConfigError: ``RANK`` alone says so, as where a shell or a cluster has left it behind.
    """
    if "RANK" not in environment:
        return False
    missing = [name for name in RANK_VARIABLES if not environment.get(name)]
    if missing:
        text = f"RANK={environment['RANK']} in the environment: makes this process a rank, but {', '.join(missing)} "
        text += f"{'is' if len(missing) == 1 else 'are'} not set; `unset RANK` to start ranks here, or use torchrun"
        raise ConfigError([text])
    return True


@contextlib.contextmanager
def launch_folder(prefix: str) -> Iterator[Path]:
    """A folder for the launcher and its ranks while they run.

    :raises LightRFTError: no folder for temporary files can be written.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        text = f"no folder for temporary files: {error.strerror}; free space there, or set TMPDIR to one with space"
        raise LightRFTError(text) from error
    with made as name:
        yield Path(name)


def run_ranks(
    config: StrategyConfig, options: argparse.Namespace, folder: Path, command: Sequence[str], *, stopping: str
) -> dict[int, Any] | None:
    """Start this node's ranks as ``python -m MODULE CONFIG FLAGS...`` and wait for them.

    :param folder: shared with the ranks, which find it in the environment variable :data:`LAUNCH_DIR`.
    :param command: the module and its flags. :param stopping: what the ranks do after Ctrl-C, for the user.
    :return: torch's ProcessFailure by rank; None if all succeeded.
    :raises NodesApartError: another node did not come, or its launcher has ended.
    """
    ranks = ranks_on_this_node(options.nproc_per_node)
    config.to_yaml(folder / CONFIG_FILE)
    module, *flags = command
    environment = {LAUNCH_DIR: str(folder), **thread_environment(ranks, os.cpu_count() or 1)}
    if not accelerators_on_this_node():
        # transformers imports DeepSpeed if installed, which otherwise warns that there is no GPU
        environment["DS_ACCELERATOR"] = "cpu"
    with _environment(environment):
        words = ["-m", module, str(folder / CONFIG_FILE), *flags]
        return _run(_launch_config(options, ranks, folder), folder, words, stopping)


def ranks_on_this_node(asked: int | None) -> int:
    """What was asked for, else one rank for each accelerator, else two on the CPU.

    :raises ConfigError: fewer than one.
    """
    if asked is not None:
        if asked < 1:
            raise ConfigError([f"--nproc_per_node {asked}: must be at least 1"])
        return asked
    return accelerators_on_this_node() or CPU_RANKS


def accelerators_on_this_node() -> int:
    """Number of accelerators; 0 if ranks compute on the CPU."""
    import torch

    return torch.accelerator.device_count()


def thread_environment(ranks: int, cores: int) -> dict[str, str]:
    """An equal share of the cores for each rank, unless the user has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


def _launch_config(options: argparse.Namespace, ranks: int, folder: Path) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    settings: dict[str, Any] = {
        "min_nodes": options.nnodes,
        "max_nodes": options.nnodes,
        "nproc_per_node": ranks,
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "logs_specs": DefaultLogsSpecs(log_dir=str(folder)),  # else each run leaves a folder of its own in /tmp
        # We handle Ctrl-C: the launcher would give the ranks 30 seconds, too few for a large checkpoint.
        "signals_to_handle": "SIGQUIT",
    }
    if options.rdzv_endpoint:
        settings |= {"rdzv_backend": "c10d", "rdzv_endpoint": options.rdzv_endpoint, "run_id": options.rdzv_id}
    elif options.nnodes > 1:
        if not options.master_addr:
            raise ConfigError([f"--nnodes {options.nnodes}: needs --master_addr (the first node) or --rdzv_endpoint"])
        settings |= {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{options.master_addr}:{options.master_port}",
            "rdzv_configs": {"rank": options.node_rank, "timeout": 900},
            "run_id": options.rdzv_id,
        }
    else:
        settings |= {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "run_id": uuid.uuid4().hex,
            "local_addr": "localhost",
        }
    return LaunchConfig(**settings)


def _run(config: Any, folder: Path, words: Sequence[str], stopping: str) -> dict[int, Any] | None:
    """Start the ranks and wait; returns the failures by rank, None if there are none."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    # The launcher logs a table and a traceback for each rank; _report says the same in a sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with _forwarded_signals(folder, stopping):
            elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as error:
        return dict(error.failures)
    except SignalException:
        (folder / ASKED_FILE).touch()
        return {}
    except (DistError, RendezvousError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise NodesApartError(
            f"the nodes do not reach each other at {config.rdzv_endpoint}: {reason}\n"
            f"Start the same command on all {config.max_nodes} nodes; with --master_addr, each with its own "
            f"--node_rank, from 0 on the first to {config.max_nodes - 1}"
        ) from error
    return None


@contextlib.contextmanager
def _forwarded_signals(folder: Path, stopping: str) -> Iterator[None]:
    """Forward SIGINT, SIGTERM and SIGHUP to the ranks, which end in their own way. A second Ctrl-C kills them.

    SIGHUP arrives twice, from the shell and from the terminal. If ``nohup`` ignores it, it stays ignored.

    :raises SignalException: no rank has started yet; torch then starts none, or ends those that are about to.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    seen: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        first = not seen
        if not first and number == signal.SIGHUP:
            return
        seen.append(number)
        (folder / ASKED_FILE).touch()  # before it is known which have started: the others look for it
        pids = rank_pids(folder)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if first else signal.SIGKILL)
        if first and pids:
            with contextlib.suppress(OSError):  # the disk of a log may be full
                sys.stderr.write(f"\nlightrft: stopping: {stopping} (press again to stop at once)\n")
        elif first:
            raise SignalException("no rank has started", signal.Signals(number))

    heeded = [n for n in FORWARDED if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heeded}
    told, tells = socket.socketpair()
    tells.setblocking(False)
    woken = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_if_deaf, args=(told, seen, folder), daemon=True, name="lightrft-deaf").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        tells.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_if_deaf(told: socket.socket, seen: Sequence[int], folder: Path) -> None:
    """The thread that ends a launcher whose handlers do not run: in torch's own code it waits for other nodes, for many
    minutes, before its ranks have started or after they have ended."""
    import psutil

    for _ in each_signal(told, FORWARDED):
        time.sleep(HANDLER_SECONDS)
        if not seen and not any(map(psutil.pid_exists, rank_pids(folder))):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                sys.stderr.write("\nlightrft: stopped while it waited for other nodes\n")
            os._exit(EXIT_INTERRUPTED)


def each_signal(told: socket.socket, wanted: Sequence[int]) -> Iterator[None]:
    """Waits at the other end of Python's wake-up descriptor, and yields when a wanted signal has come.

    It reads until that descriptor is closed: Python complains of a signal that it cannot write.
    """
    with told:
        while numbers := told.recv(64):
            if not set(numbers).isdisjoint(wanted):
                yield


def rank_pids(folder: Path) -> list[int]:
    """Process ids of the ranks that have started."""
    return [int(path.name.removeprefix("pid.")) for path in folder.glob("pid.*")]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def resume_line(command: str, output_dir: str, options: argparse.Namespace) -> str:
    """The shell's line that continues a run on as many ranks: another number changes the last bits."""
    flags = ["nproc_per_node"]
    if options.nnodes > 1:
        flags += ["nnodes", "node_rank", "master_addr", "master_port", "rdzv_endpoint", "rdzv_id"]
    # A flag does not take a next word that looks like another flag.
    place = [f"--output_dir={output_dir}"] if output_dir.startswith("-") else ["--output_dir", output_dir]
    words = ["lightrft", command, "--resume", *place]
    for flag in flags:
        if (value := getattr(options, flag)) is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def _report(
    folder: Path, failures: dict[int, Any] | None, options: argparse.Namespace, *, apart: str | None = None
) -> int:
    """Report how the ranks ended, and how to continue. Returns the exit code.

    :param apart: why the nodes do not reach each other, if that is what ended the ranks.
    """
    word = folder / "outcome.json"
    outcome = json.loads(word.read_text(encoding="utf-8")) if word.exists() else {}
    output_dir = outcome.get("output_dir")
    resume = resume_line(outcome["command"], output_dir, options) if output_dir else None
    saved = output_dir is not None and (Path(output_dir) / "checkpoints" / "latest").exists()
    if failures is None and not outcome.get("interrupted"):
        return 0
    if outcome.get("interrupted"):
        sys.stderr.write(
            f"lightrft: stopped at step {outcome['step']}; a checkpoint was written. Continue with:\n  {resume}\n"
        )
        return EXIT_INTERRUPTED
    if (folder / ASKED_FILE).exists():
        sys.stderr.write(
            "lightrft: stopped before there was anything to save\n"
            if not saved
            else f"lightrft: stopped. Continue from the last checkpoint with:\n  {resume}\n"
        )
        return EXIT_INTERRUPTED
    sys.stderr.write(f"lightrft: {apart or describe_failures(failures or {})}\n")
    if outcome.get("wrong_use"):
        return 2
    if resume is not None:
        anew = "There is no checkpoint yet. Start again, with other settings if you pass some:"
        sys.stderr.write(f"{'Continue from the last checkpoint with:' if saved else anew}\n  {resume}\n")
    return EXIT_FAILED


def describe_failures(failures: dict[int, Any]) -> str:
    """The root cause in a sentence: the first rank that failed by itself, not those that the launcher then ended.

    :param failures: torch's ProcessFailure by rank.
    """
    if not failures:
        return "the ranks ended early"

    def was_killed(failure: Any) -> bool:
        return failure.exitcode < 0 and failure.exitcode not in (-signal.SIGTERM, -signal.SIGABRT)

    first_kill = min((failure.timestamp for failure in failures.values() if was_killed(failure)), default=0)

    def order(item: tuple[int, Any]) -> tuple[int, int, int]:
        rank, failure = item
        if failure.exitcode == -signal.SIGTERM:  # ended by the launcher because another had failed
            place = 4
        elif was_killed(failure):
            place = 1
        # A rank that loses its peer fails too, with an error or an abort within gloo, but is not the cause.
        elif failure.exitcode == -signal.SIGABRT or _extra(failure).get("secondary"):
            place = 3
        else:  # an error before any kill is the cause: the launcher kills ranks that do not end by themselves
            place = 0 if failure.timestamp < first_kill else 2
        return place, failure.timestamp, rank

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory? or it stalled and was killed)" if -failure.exitcode == signal.SIGKILL else ""
        # A stalled rank is killed too: the ranks that waited for it say which it was.
        seen = next((f"\n{f.message['message']}" for f in failures.values() if _extra(f).get("secondary")), "")
        return f"rank {rank} was killed by {name}{hint}{seen}"
    if isinstance(failure.message, dict):
        text = failure.message["message"]
        return text if _extra(failure).get("of_another_rank") else f"rank {rank}: {text}"
    return f"rank {rank} ended with exit code {failure.exitcode}"


def _extra(failure: Any) -> dict[str, Any]:
    return failure.message.get("extraInfo", {}) if isinstance(failure.message, dict) else {}
