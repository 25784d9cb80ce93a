"""The conversion's command line, which the six scripts and ``lightrft convert`` share. Loads torch only to convert."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lightrft.strategy.errors import LightRFTError

EXIT_FAILED = 2
KINDS = {
    "hf": "a Hugging Face folder, which from_pretrained loads (weights only)",
    "ds": "a checkpoint as DeepSpeed strategies write it",
    "fsdp": "a checkpoint as FSDP2 strategies write it",
}
DTYPES = ("float32", "bfloat16", "float16")
DESCRIPTION = """\
Convert a checkpoint or a Hugging Face folder, tensor by tensor, without starting ranks or building the model. IN
may be a LightRFT checkpoint of any backend and world size, a folder of them (the newest complete one is taken), a
Hugging Face folder, a PyTorch DCP checkpoint, or what DeepSpeed's engine.save_checkpoint wrote (needs
lightrft-deepspeed). From checkpoint to checkpoint everything is converted: weights, optimizer states, scheduler, step
and random states.
"""
EPILOG = """\
examples:
  lightrft convert runs/a/checkpoints out/model                     the newest checkpoint's actor, for from_pretrained
  lightrft convert runs/a/checkpoints/step_100 out/model --dtype bfloat16 --verify
  lightrft convert runs/a/checkpoints/step_100 out/fsdp --to fsdp   continue with --fsdp: load_ckpt(model, "out/fsdp")
  lightrft convert out/model out/ds --to ds                         start with DeepSpeed: load_ckpt(model, "out/ds")
  lightrft convert deepspeed_run/global_step200 out/model --pretrain base_model
"""


def add_convert_arguments(parser: argparse.ArgumentParser, *, to: str | None = None) -> argparse.ArgumentParser:
    """Add the flags. :param to: what to make, if the script's name decides it."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="IN", help="What to convert: a folder.")
    parser.add_argument("target", metavar="OUT", help="The folder to write; it appears only when complete.")
    if to is None:
        parser.epilog = EPILOG
        kinds = "; ".join(f"{name}: {text}" for name, text in KINDS.items())
        parser.add_argument("--to", choices=list(KINDS), default="hf", help=f"What to make (default: hf). {kinds}.")
    parser.add_argument("--tag", metavar="TAG", help="Which checkpoint in IN; default: the newest complete one.")
    parser.add_argument(
        "--model", metavar="NAME", help="Which model of the checkpoint (default: actor, or the only one)."
    )
    parser.add_argument("--pretrain", metavar="DIR", help="A folder with the model's config.json, if IN has none.")
    if to in (None, "hf"):
        parser.add_argument("--dtype", choices=DTYPES, help="Cast the weights (hf only); default: as stored.")
        parser.add_argument(
            "--max_shard_size",
            default="5GB",
            metavar="SIZE",
            help="Size limit of each safetensors file (hf only; default: 5GB).",
        )
    parser.add_argument("--verify", action="store_true", help="Read every tensor back and compare it with its source.")
    parser.add_argument("--force", action="store_true", help="Replace an existing OUT, once the new one is complete.")
    return parser


def run_convert(options: argparse.Namespace, *, to: str | None = None, expect: str | None = None) -> int:
    """Convert, with a progress bar on a terminal; returns the exit code: 0 done, 2 refused."""
    import torch

    from lightrft.strategy.conversion import convert

    chosen: Any = to or options.to
    dtype = getattr(options, "dtype", None)
    try:
        with _Bar() as bar:
            done = convert(
                options.source,
                options.target,
                to=chosen,
                expect=expect,
                tag=options.tag,
                model=options.model,
                pretrain=options.pretrain,
                dtype=getattr(torch, dtype) if dtype else None,
                max_shard_size=getattr(options, "max_shard_size", "5GB"),
                verify=options.verify,
                force=options.force,
                progress=bar,
            )
    except (LightRFTError, ValueError) as error:
        sys.stderr.write(f"lightrft: {error}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{done}\n")
    return 0


def main(expect: str, to: str, argv: Sequence[str] | None = None) -> int:
    """One of the six scripts: from ``expect`` to ``to``."""
    parser = argparse.ArgumentParser(prog=f"python -m lightrft.utils.ckpt_scripts.{expect}2{to}")
    return run_convert(add_convert_arguments(parser, to=to).parse_args(argv), to=to, expect=expect)


class _Bar:
    """rich's bar on standard error, where that is a terminal."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.disable:  # rich 13 and 14 would end what they have not written by an empty line
            self._progress.stop()

    def start(self, title: str, total: int) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._task = self._progress.add_task(title, total=total)

    def advance(self, name: str, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)
