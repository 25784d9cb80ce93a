"""The ``lightrft`` command. Nothing here loads torch: ``lightrft --help`` answers at once."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Never

from lightrft.strategy.config import FIELDS
from lightrft.strategy.errors import ConfigError, LightRFTError
from lightrft.utils import add_arguments
from lightrft.utils.ckpt_scripts import add_convert_arguments, run_convert

from .doctor import add_doctor_arguments, run_doctor
from .output import outlive_reader

EXIT_WRONG_USE = 2

EPILOG = """\
Settings come from, each overriding the one before: a preset (the default one unless --pretrain or --prompt_data
is given), the saved run (with --resume), --config FILE, the flags you type. --no_FLAG switches off what one of them
switched on.

  lightrft train                                          the built-in task, on this machine as it is
  lightrft train --pretrain DIR --prompt_data FILE.jsonl --reward exact_match --fsdp --engine_type hf
  lightrft train --resume                                 continue the last run
"""


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line, without the list of all flags."""

    def error(self, message: str) -> Never:
        self.exit(EXIT_WRONG_USE, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The command's parser, with one subparser for each subcommand."""
    parser = Parser(prog="lightrft", description="Reinforcement fine-tuning of language and vision-language models.")
    parser.add_argument("--version", action="version", version=f"lightrft-trainer {version('lightrft-trainer')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in (
        ("train", "train a language model; without arguments, a small one on a built-in task"),
        ("train-vl", "train a vision-language model"),
    ):
        command = commands.add_parser(
            name,
            usage=f"lightrft {name} [--FLAG VALUE ...]",
            help=text,
            description=text,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_launch_arguments(command)
        add_arguments(command, suppress_defaults=True)
        _leave_values_unread(command)
    text = "check machine, backend and engine before a run"
    examine = commands.add_parser("doctor", usage="lightrft doctor [--json] [--FLAG VALUE ...]", help=text)
    add_doctor_arguments(examine, add_launch_arguments)
    add_convert_arguments(
        commands.add_parser("convert", help="convert checkpoints and Hugging Face folders into each other")
    )
    return parser


def _leave_values_unread(parser: argparse.ArgumentParser) -> None:
    """Keep settings as text: argparse would stop at the first wrong value, the configuration reports all."""
    for action in parser._actions:
        if action.dest in FIELDS and action.option_strings:
            if action.choices is not None:
                action.metavar, action.choices = f"{{{','.join(action.choices)}}}", None
            action.type = None


def unknown_flags(given: Iterable[str], parser: argparse.ArgumentParser) -> list[str]:
    """A sentence for each argument that the parser does not know, with the nearest flags that it does."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    problems = []
    for flag in (text.split("=")[0] for text in given if text.startswith("-")):
        near = difflib.get_close_matches(flag, known, n=3, cutoff=0.75)
        hint = f"did you mean {', '.join(near)}?" if near else f"see {parser.prog} --help"
        problems.append(f"{flag}: unknown flag; {hint}")
    hint = "; a switch takes no value: --bf16 turns it on, --no_bf16 off"
    return problems or [
        f"{text!r}: unexpected argument{hint if text.lower() in ('true', 'false') else ''}" for text in given
    ]


def add_launch_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that say where settings come from and which ranks to start; they are not settings of the run."""
    group = parser.add_argument_group("where settings come from")
    group.add_argument("--config", metavar="FILE", help="YAML file of settings, named like their flags.")
    group.add_argument("--preset", metavar="NAME", help="Start from these settings; see --list_presets.")
    group.add_argument("--list_presets", action="store_true", help="List the presets and exit.")
    group = parser.add_argument_group("which ranks to start (nothing is started under torchrun)")
    group.add_argument(
        "--nproc_per_node", type=int, metavar="N", help="Ranks on this node; default: one per accelerator, else 2."
    )
    group.add_argument(
        "--nnodes",
        type=int,
        default=1,
        metavar="N",
        help="Number of nodes; start the same command on each (default: 1).",
    )
    group.add_argument(
        "--node_rank", type=int, default=0, metavar="N", help="This node's rank, with --master_addr (default: 0)."
    )
    group.add_argument("--master_addr", metavar="HOST", help="Address of the first node, if --nnodes is above 1.")
    group.add_argument(
        "--master_port", type=int, default=29500, metavar="PORT", help="Port on the first node (default: 29500)."
    )
    group.add_argument(
        "--rdzv_endpoint", metavar="HOST:PORT", help="torchrun's rendezvous, instead of --master_addr and --node_rank."
    )
    group.add_argument(
        "--rdzv_id", default="lightrft", metavar="ID", help="Name of the run at the rendezvous (default: lightrft)."
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 failed, 2 wrong use, 130 stopped by Ctrl-C."""
    outlive_reader()
    parser = build_parser()
    namespace, rest = parser.parse_known_args(argv)
    if namespace.command not in ("train", "train-vl", "doctor"):
        namespace = parser.parse_args(argv)  # which refuses what it does not know
    if namespace.command is None:
        parser.print_help()
        return 0
    if namespace.command == "convert":
        return run_convert(namespace)
    if namespace.list_presets:
        return list_presets()
    problems = unknown_flags(rest, _command(parser, namespace.command)) if rest else []
    if namespace.command == "doctor":
        return run_doctor(namespace, problems)
    return run_command(namespace, multimodal=namespace.command == "train-vl", problems=problems)


def list_presets() -> int:
    """Print the presets; returns the command's exit code."""
    from . import settings

    for name in settings.preset_names():
        sys.stdout.write(f"{name}: {settings.preset_title(name)}\n")
    return 0


def _command(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[name]


def run_command(namespace: argparse.Namespace, *, multimodal: bool, problems: Sequence[str] = ()) -> int:
    """Check the settings, then start the ranks (or be one, under torchrun).

    :param problems: faults found on the command line; they are reported together with those of the settings.
    """
    from . import settings

    try:
        ranks = namespace.nproc_per_node * namespace.nnodes if namespace.nproc_per_node else None
        try:
            config = settings.check_settings(
                settings.load_settings(namespace), multimodal=multimodal, world_size=ranks if (ranks or 0) > 0 else None
            )
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from error
        if problems:
            raise ConfigError(list(problems))
        from .launch import launch

        return launch(config, namespace, multimodal=multimodal)
    except LightRFTError as error:
        sys.stderr.write(f"lightrft: {error}\n")
        return EXIT_WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
