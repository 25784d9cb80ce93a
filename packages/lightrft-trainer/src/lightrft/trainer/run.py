"""A whole run on one rank: build everything that the settings name, train, save, report."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.strategy import get_strategy
from lightrft.strategy.config import FIELDS, StrategyConfig
from lightrft.strategy.errors import ConfigError

from .interruption import Interruption
from .spmd_ppo_trainer import CHECKPOINTS, SPMDPPOTrainer
from .spmd_ppo_trainer_vl import SPMDPPOTrainerVL

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase

logger = logging.getLogger("lightrft")

CONFIG_FILE = "config.yaml"
MODEL, EMA_MODEL, INITIAL_MODEL = "model", "model_ema", "initial_model"


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    :param evaluation: held-out accuracy by step. :param answers: of the last evaluation.
    """

    output_dir: str
    step: int
    interrupted: bool
    seconds: float
    evaluation: dict[str, float] = field(default_factory=dict)
    answers: Sequence[dict[str, Any]] = ()
    held_out: int = 0


def train(
    config: StrategyConfig, *, multimodal: bool = False, on_output_dir: Callable[[str], None] = lambda _: None
) -> RunResult:
    """Run the training that ``config`` describes. Every rank calls.

    :param on_output_dir: told the run's folder as soon as it is known.
    :raises ConfigError: the folder holds another run.
    """
    begun = time.monotonic()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
    strategy = get_strategy(config)
    strategy.setup_distributed()
    output_dir = claim_output_dir(strategy, config)
    on_output_dir(str(output_dir))
    config = dataclasses.replace(
        strategy.config, output_dir=str(output_dir), log_dir=strategy.config.log_dir or str(output_dir)
    )
    with Interruption() as interruption:
        trainer, loader, held_out = build(strategy, config, output_dir, multimodal=multimodal)
        state = trainer.fit(config, loader, eval_prompts=held_out, interruption=interruption)
    if not trainer.interrupted:
        strategy.save_model(trainer.actor, trainer.processor or trainer.tokenizer, output_dir / MODEL)
        if trainer.ema_model is not None:
            strategy.save_model(trainer.ema_model, trainer.processor or trainer.tokenizer, output_dir / EMA_MODEL)
    return RunResult(
        str(output_dir),
        state.step,
        trainer.interrupted,
        time.monotonic() - begun,
        state.evaluation,
        trainer.last_evaluation.answers if trainer.last_evaluation is not None else (),
        len(held_out),
    )


def claim_output_dir(strategy: StrategyBase, config: StrategyConfig) -> Path:
    """The run's folder, decided on rank 0: the one asked for, or a new one under the default, with ``latest`` pointing to it.

    :raises ConfigError: it holds a run already, and this is no resume. Raised on every rank.
    """
    decided: tuple[str, str | None] = ("", None)
    if strategy.is_rank_0():
        folder = Path(config.output_dir)
        default = config.output_dir == FIELDS["output_dir"].default
        if default and not config.resume:
            folder = _new_folder(folder.parent)
            _point(folder.parent / Path(config.output_dir).name, folder.name)
        problem = None
        if not config.resume and (folder / CONFIG_FILE).exists():
            problem = f"--output_dir {str(folder)!r}: holds a run already; add --resume to go on with it, or name another folder"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            saved = dataclasses.replace(config, output_dir=str(folder), resume=False)
            scratch = folder / f".{CONFIG_FILE}"
            saved.to_yaml(scratch)
            scratch.replace(folder / CONFIG_FILE)
        decided = (str(folder), problem)
    name, problem = strategy.all_gather_object(decided)[0]
    if problem is not None:
        raise ConfigError([problem])
    return Path(name)


def _new_folder(parent: Path) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = parent / (stamp if number == 0 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent}: no free name for a run")


def _point(link: Path, target: str) -> None:
    """Let ``link`` point to a run, unless somebody keeps a real folder there."""
    if link.exists() and not link.is_symlink():
        return
    scratch = link.with_name(f".{link.name}.{target}")
    scratch.symlink_to(target, target_is_directory=True)
    scratch.replace(link)
