"""A whole run on one rank: build everything from the settings, train, save, report."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.data import prompt_dataset_from_config
from lightrft.models import ActorLanguage, ActorVL, CriticLanguage, CriticVL, RewardModel
from lightrft.models.lora import save_adapter
from lightrft.rewards import needs_labels
from lightrft.strategy import get_strategy
from lightrft.strategy.config import FIELDS, StrategyConfig
from lightrft.strategy.errors import ConfigError

from .interruption import Interruption
from .minibatches import optimizer_steps
from .spmd_ppo_trainer import SPMDPPOTrainer
from .vocabularies import require_same_tokens

if TYPE_CHECKING:
    from torch import nn

    from lightrft.strategy import StrategyBase

logger = logging.getLogger("lightrft")

CONFIG_FILE = "config.yaml"
MODEL, EMA_MODEL, INITIAL_MODEL, ADAPTER = "model", "model_ema", "initial_model", "adapter"
TASK = "task:reverse_digits"


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    :param evaluation: held-out accuracy and mean reward by step. :param answers: of the last evaluation.
    """

    output_dir: str
    step: int
    interrupted: bool
    seconds: float
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: Sequence[dict[str, Any]] = ()
    held_out: int = 0


def train(
    config: StrategyConfig,
    *,
    trainer_class: type[SPMDPPOTrainer] = SPMDPPOTrainer,
    on_output_dir: Callable[[str], None] = lambda _: None,
) -> RunResult:
    """Run the training that ``config`` describes. Every rank calls.

    :param trainer_class: for example one of your own; a subclass of SPMDPPOTrainerVL for a vision-language model.
    :param on_output_dir: called with the run's folder as soon as it is known.
    :raises ConfigError: the folder holds another run.
    """
    begun = time.monotonic()
    quiet_libraries()
    strategy = get_strategy(config)
    strategy.setup_distributed()
    output_dir = claim_output_dir(strategy, config)
    on_output_dir(str(output_dir))
    config = dataclasses.replace(
        strategy.config, output_dir=str(output_dir), log_dir=strategy.config.log_dir or str(output_dir)
    )
    with Interruption() as interruption:
        trainer, loader, held_out = build(strategy, config, output_dir, trainer_class)
        state = trainer.fit(config, loader, eval_prompts=held_out, interruption=interruption)
    if not trainer.interrupted:
        strategy.save_model(trainer.actor, trainer.processor or trainer.tokenizer, output_dir / MODEL)
        if trainer.ema_model is not None:
            strategy.save_model(trainer.ema_model, trainer.processor or trainer.tokenizer, output_dir / EMA_MODEL)
        if config.lora_rank:
            save_adapter(strategy, trainer.actor, output_dir / ADAPTER)
    # The caller may continue, with another run for example, and needs the engines' memory.
    for engine in [*(trainer.reward_model if config.rm_use_engine else ()), strategy.engine_host]:
        engine.shutdown()
    return RunResult(
        str(output_dir),
        state.step,
        trainer.interrupted,
        time.monotonic() - begun,
        state.evaluation,
        trainer.last_evaluation.answers if trainer.last_evaluation is not None else (),
        len(held_out),
    )


def quiet_libraries() -> None:
    """Keep the progress bars of loading out of the run's output."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def claim_output_dir(strategy: StrategyBase, config: StrategyConfig) -> Path:
    """The run's folder, decided on rank 0: the given one, or a new one to which ``latest`` points.

    :raises ConfigError: it already has a run, and ``resume`` is off. Raised on every rank.
    """
    decided: tuple[str, str | None] = ("", None)
    if strategy.is_rank_0():
        folder = Path(config.output_dir)
        if folder.is_symlink():  # `latest`: a later run will change it
            folder = folder.parent / folder.readlink()
        default = config.output_dir == FIELDS["output_dir"].default
        if default and not config.resume:
            folder = _new_folder(folder.parent)
            _point(folder.parent / Path(config.output_dir).name, folder.name)
        problem = None
        if not config.resume and (folder / CONFIG_FILE).exists():
            problem = f"--output_dir {str(folder)!r}: already holds a run; add --resume to continue it"
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
    """Let ``link`` point to a run, unless there is a real folder of that name."""
    if link.exists() and not link.is_symlink():
        return
    scratch = link.with_name(f".{link.name}.{target}")
    scratch.symlink_to(target, target_is_directory=True)
    scratch.replace(link)


# ---- building -------------------------------------------------------------------------------------------------------
def build(
    strategy: StrategyBase,
    config: StrategyConfig,
    output_dir: Path,
    trainer_class: type[SPMDPPOTrainer] = SPMDPPOTrainer,
) -> tuple[SPMDPPOTrainer, Any, list[Any]]:
    """Models, data, engine and trainer of a run.

    :return: the trainer, the loader of prompts, the held-out prompts.
    """
    multimodal = trainer_class.multimodal
    if config.pretrain is None:
        config = built_in_task(strategy, config, output_dir)
    assert config.pretrain is not None
    tokenizer, processor = load_tokenizer(config, multimodal=multimodal)
    graders = [("reward_pretrain", name) for name in config.reward_names]
    critics = [("critic_pretrain", config.critic_pretrain)] if config.critic_pretrain else []
    require_same_tokens(tokenizer, [*graders, *critics], trust_remote_code=config.trust_remote_code)
    reader, options = processor or tokenizer, data_options(config, multimodal=multimodal)
    prompts = prompt_dataset_from_config(config, reader, **options)
    held_out = prompt_dataset_from_config(config, reader, evaluation=True, **options) if config.eval_data else []
    steps = rollout_steps(config, len(prompts))
    samples = config.rollout_batch_size * config.n_samples_per_prompt
    max_steps = steps * config.max_epochs * optimizer_steps(samples, config.train_batch_size)
    actor, critic, reward_models, reference, average = build_models(strategy, config, multimodal=multimodal)
    (actor, actor_optim, actor_scheduler), (critic, critic_optim, critic_scheduler), reward_models, reference = (
        strategy.prepare_models_and_optimizers(actor, critic, reward_models, reference, config, max_steps)
    )
    if average is not None:
        average = strategy.prepare_average(average)
    if config.rm_use_engine:  # first: it sleeps before the rollout engine takes its memory
        reward_models = [strategy.setup_reward_engine(name) for name in config.reward_names]
    strategy.setup_inference_engine(config, engine_type=config.engine_type)
    trainer = trainer_class(
        strategy,
        actor,
        critic,
        reward_models,
        reference,
        average,
        actor_optim,
        critic_optim,
        actor_scheduler,
        critic_scheduler,
        tokenizer=tokenizer,
        processor=processor,
        output_dir=output_dir,
    )
    loader = strategy.setup_dataloader(
        prompts,
        config.rollout_batch_size // strategy.data_parallel_size,
        collate_fn=prompts.collate_fn,
    )
    return trainer, loader, [held_out[i] for i in range(len(held_out))]


def data_options(config: StrategyConfig, *, multimodal: bool) -> dict[str, Any]:
    """Options of a run's datasets: images for vision-language models, labels if a rule reads them or a key is given."""
    named = config.label_key != FIELDS["label_key"].default
    return {"labels_optional": not (named or needs_labels(config.reward)), "takes_images": multimodal}


def built_in_task(strategy: StrategyBase, config: StrategyConfig, output_dir: Path) -> StrategyConfig:
    """The settings with the built-in task and its model filled in; rank 0 builds the model into the run's folder."""
    folder = output_dir / INITIAL_MODEL
    if strategy.is_rank_0() and not folder.exists():
        from lightrft.data.warm_start import build_warm_model

        strategy.print(
            "building a small model, with a short supervised warm start so that some of its answers are correct"
        )
        scratch = folder.with_name(f".{folder.name}")
        report = build_warm_model(scratch, seed=config.seed)
        scratch.rename(folder)
        strategy.print(str(report))
    strategy.barrier()
    return dataclasses.replace(
        config, pretrain=str(folder), prompt_data=TASK, eval_data=TASK, prompt_split="train", eval_split="test"
    )


def load_tokenizer(config: StrategyConfig, *, multimodal: bool) -> tuple[Any, Any]:
    """Tokenizer and, for a vision-language model, processor. A missing padding token is replaced by the end token.

    :raises ConfigError: there is none, or a vision-language model was asked for, and this one takes no images.
    """
    import transformers

    loader, what = (
        (transformers.AutoProcessor, "processor") if multimodal else (transformers.AutoTokenizer, "tokenizer")
    )
    try:
        loaded: Any = loader.from_pretrained(config.pretrain, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        place = "" if Path(str(config.pretrain)).is_dir() else "there is no such folder, and as a name on the hub, "
        raise ConfigError([f"--pretrain {config.pretrain}: {place}its {what} cannot be loaded: {error}"]) from error
    if multimodal and getattr(loaded, "image_processor", None) is None:
        raise ConfigError([f"--pretrain {config.pretrain}: takes no images; `lightrft train` trains it"])
    tokenizer, processor = (loaded.tokenizer, loaded) if multimodal else (loaded, None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, processor


def rollout_steps(config: StrategyConfig, prompts: int) -> int:
    """Rollout steps of the run.

    :raises ConfigError: there are fewer prompts than a rollout needs.
    """
    per_episode = prompts // config.rollout_batch_size
    if per_episode == 0:
        raise ConfigError(
            [f"--rollout_batch_size {config.rollout_batch_size}: there are only {prompts} prompts; at most {prompts}"]
        )
    steps = per_episode * config.num_episodes
    return steps if config.max_steps is None else min(steps, config.max_steps)


def build_models(
    strategy: StrategyBase, config: StrategyConfig, *, multimodal: bool
) -> tuple[nn.Module, nn.Module | None, Sequence[nn.Module] | None, nn.Module | None, nn.Module | None]:
    """Actor, critic, reward models, reference and moving average, on the CPU or the meta device (``--meta_init``)."""
    import torch

    compute = getattr(torch, strategy.config.dtype_name)
    options: dict[str, Any] = {
        "dtype": compute,  # frozen models are held in the dtype in which they compute
        "compute_dtype": compute,
        "use_flash_attention_2": config.flash_attn,
        "trust_remote_code": config.trust_remote_code,
    }
    asked = {
        **options,
        "packing_samples": config.packing_samples,
        "sequence_group": strategy.sequence_group,
    }
    adapters = {name: getattr(config, name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")}
    trained = {
        **asked,
        **adapters,
        # with adapters the weights are frozen; the adapters themselves are in fp32
        "dtype": compute if config.use_mp_opt or config.lora_rank else torch.float32,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    policy = {"fused_linear_logprob": config.fused_linear_logprob, "chunk_size": config.chunk_size}
    actor_class, critic_class = (ActorVL, CriticVL) if multimodal else (ActorLanguage, CriticLanguage)
    with strategy.init_model_context(meta_init=config.meta_init):
        actor = actor_class(config.pretrain, **trained, **policy)
        critic = None
        if config.advantage_estimator == "gae":
            critic = critic_class(config.critic_pretrain or config.pretrain, **trained)
        reward_models = None
        if config.reward_names and not config.rm_use_engine:
            reward_models = [RewardModel(name, **options) for name in config.reward_names]
        reference = None
        if config.init_kl_coef > 0 and not config.lora_rank:  # else it is the actor without its adapters
            reference = actor_class(config.pretrain, **asked, **policy)
        average = None
        if config.enable_ema:  # In 16 bits most updates of an average would be rounded away.
            average = actor_class(config.pretrain, **{**options, **adapters, "dtype": torch.float32})
    return actor, critic, reward_models, reference, average
