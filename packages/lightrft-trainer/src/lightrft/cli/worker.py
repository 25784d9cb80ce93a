"""One rank: reads the launcher's settings, trains, and writes its outcome.

Run as ``python -m lightrft.cli.worker CONFIG``; the heavy imports come after the rank has written its process id.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import ConfigError, LightRFTError, PluginError, RankTimeoutError

from .launch import ASKED_FILE, EXIT_FAILED, EXIT_INTERRUPTED, LAUNCH_DIR, each_signal
from .output import outlive_reader

if TYPE_CHECKING:
    from lightrft.trainer.run import RunResult

PR_SET_PDEATHSIG = 1
ORPHAN_SECONDS = 30.0  # as long as the launcher waits for ranks that it ends
# Time for this rank to find out and report which other rank has failed.
FAREWELL_SECONDS = 10.0


def main() -> int:
    """Entry point of a rank."""
    parser = argparse.ArgumentParser(prog="lightrft-worker")
    parser.add_argument("config")
    parser.add_argument("--multimodal", action="store_true")
    options = parser.parse_args()
    outlive_reader()
    join_launcher()
    return run_rank(StrategyConfig.from_yaml(options.config), multimodal=options.multimodal)


def run_rank(config: StrategyConfig, *, multimodal: bool) -> int:
    """Train as one rank and return its exit code; an error is written where the launcher looks for it."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rank = int(os.environ.get("RANK", "0"))
    tells = os.environ.get("LOCAL_RANK", "0") == "0"  # to the launcher; each node has one
    output: list[str] = []

    def known(output_dir: str) -> None:
        output.append(output_dir)
        if tells:  # at once: a rank that dies with its peers writes nothing more
            _leave_word({"output_dir": output_dir}, multimodal=multimodal)

    try:
        from lightrft.trainer import SPMDPPOTrainer, SPMDPPOTrainerVL
        from lightrft.trainer.run import train

        result = train(config, trainer_class=SPMDPPOTrainerVL if multimodal else SPMDPPOTrainer, on_output_dir=known)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last frame of a rank: any error is reported, and the rank fails
        from lightrft.strategy.journal import note_departure

        note_departure(error)  # ranks that wait for this one name it
        _report_error(error, rank, output[-1] if output else None, log_dir=config.log_dir, multimodal=multimodal)
        return EXIT_FAILED
    _leave_groups()
    launched = LAUNCH_DIR in os.environ
    if rank == 0 and not result.interrupted:
        show_result(result)
    if tells:
        _leave_word(
            {"output_dir": result.output_dir, "interrupted": result.interrupted, "step": result.step},
            multimodal=multimodal,
        )
    return EXIT_INTERRUPTED if result.interrupted and not launched else 0


def _leave_groups() -> None:
    """NCCL complains if a process ends without this; gloo does not need it."""
    import torch

    if torch.accelerator.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def show_result(result: RunResult) -> None:
    """The report at the end of a run."""
    from .report import show_report

    found = [result.evaluation[step] for step in sorted(result.evaluation, key=int)]
    show_report(
        before=found[0] if len(found) > 1 else None,
        after=found[-1] if found else None,
        held_out=result.held_out,
        answers=result.answers,
        output_dir=Path(result.output_dir),
        seconds=result.seconds,
        steps=result.step,
    )


def join_launcher(patience: float = ORPHAN_SECONDS) -> None:
    """Write this rank's process id for the launcher, and end when it ends.

    :param patience: seconds after the launcher's end that this rank has to end by itself.
    """
    launcher = os.getppid()
    die_with_parent()
    threading.Thread(target=_end_as_orphan, args=(launcher, patience), daemon=True, name="lightrft-orphan").start()
    if folder := os.environ.get(LAUNCH_DIR):
        (Path(folder) / f"pid.{os.getpid()}").touch()
        if (Path(folder) / ASKED_FILE).exists():  # before the launcher knew of this rank
            signal.raise_signal(signal.SIGTERM)
        told, tells = socket.socketpair()
        tells.setblocking(False)
        signal.set_wakeup_fd(tells.detach(), warn_on_full_buffer=False)  # works also while a library waits
        arguments = (told, launcher, Path(folder))
        threading.Thread(target=_end_with_peers, args=arguments, daemon=True, name="lightrft-farewell").start()


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the launcher dies: this rank may still finish its step."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_as_orphan(launcher: int, patience: float) -> None:
    """The thread that ends a stuck rank, for example in a library's wait for another one, after its launcher's end."""
    while os.getppid() == launcher:
        time.sleep(min(1.0, patience))
    time.sleep(patience)
    os._exit(EXIT_FAILED)


def _end_with_peers(told: socket.socket, launcher: int, folder: Path) -> None:
    """The thread that ends this rank if the launcher ends it because another one, for which it may wait, has failed.

    Not if the user has asked for a checkpoint, nor if the launcher itself has died: ranks can still write one.
    """
    for _ in each_signal(told, (signal.SIGTERM,)):
        time.sleep(FAREWELL_SECONDS)
        if os.getppid() == launcher and not (folder / ASKED_FILE).exists():
            os._exit(EXIT_FAILED)


def _report_error(
    error: Exception, rank: int, output_dir: str | None, *, log_dir: str | None, multimodal: bool
) -> None:
    """One sentence for the launcher, the traceback into the run's folder."""
    from lightrft.strategy.disk import is_full

    wrong_use = isinstance(error, (ConfigError, PluginError))
    text = str(error) if isinstance(error, LightRFTError) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    told = isinstance(error, LightRFTError) and error.of_another_rank  # the text begins with that rank
    if output_dir is not None:
        if is_full(error) and not isinstance(error, LightRFTError):
            text += f": {_room(output_dir, log_dir or output_dir, tempfile.gettempdir())}; free some, then continue"
        path = Path(output_dir) / "errors" / f"rank{rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(trace, encoding="utf-8", errors="backslashreplace")
            text += f"\n(the traceback is in {path})"
        except OSError:  # the folder may be what is full or gone
            text += f"\n{trace}"
    elif not wrong_use:
        text += f"\n{trace}"
    error_file, told_here = os.environ.get("TORCHELASTIC_ERROR_FILE"), False
    if error_file:
        content: dict[str, Any] = {
            "message": {
                "message": text,
                "extraInfo": {
                    "py_callstack": trace,
                    "timestamp": str(int(time.time())),
                    "secondary": told or isinstance(error, RankTimeoutError),
                    "of_another_rank": told,
                },
            }
        }
        try:
            Path(error_file).write_text(json.dumps(content), encoding="utf-8")
        except OSError:  # the launcher's own disk is full: the user still has to see it
            told_here = True
    if told_here or LAUNCH_DIR not in os.environ:
        sys.stderr.write(f"lightrft: rank {rank}: {text}\n")
    elif output_dir is not None or wrong_use:
        _leave_word({"output_dir": output_dir, "wrong_use": wrong_use}, multimodal=multimodal)


def _room(*folders: str) -> str:
    """The space that is left where a run writes: the error of a full disk names no folder."""
    from lightrft.strategy.disk import human_bytes

    there = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
    rooms = [f"{human_bytes(shutil.disk_usage(folder).free)} in {folder}" for folder in there]
    return f"there is room for {', '.join(rooms)}"


def _leave_word(word: dict[str, Any], *, multimodal: bool) -> None:
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        path = Path(folder) / f"outcome.{os.getpid()}"
        path.write_text(json.dumps({"command": "train-vl" if multimodal else "train", **word}), encoding="utf-8")
        path.replace(Path(folder) / "outcome.json")


if __name__ == "__main__":
    sys.exit(main())
