from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.data import PromptDataset
from lightrft.data.records import Record
from lightrft.data.tasks import build_model, build_tokenizer, reverse_digits
from lightrft.models import ActorLanguage, CriticLanguage
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.trainer import SPMDPPOTrainer

# Making all 10,000 strings takes longer than a step.
EXAMPLES = reverse_digits().train[:24]


@dataclass
class Setup:
    """A trainer on FakeStrategy and the embedded engine; a step takes some hundredths of a second."""

    strategy: FakeStrategy
    trainer: SPMDPPOTrainer
    loader: Any
    prompts: PromptDataset

    def fit(self, **options: Any) -> Any:
        return self.trainer.fit(None, self.loader, **options)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.trainer.actor.state_dict().items()}


def even_digits(prompts: list[str], responses: list[str], labels: list[Any], **extras: Any) -> list[float]:
    """A reward that an untrained model earns now and then, and that it can learn within a few steps."""
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in responses]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Setup]:
    """Builds a :class:`Setup`; keywords are settings, ``trainer_class`` and ``reward_fn`` are what they say.

    ``model_options`` are those of the models; without them the models get what the settings ask for. ``generate`` are
    the trainer's own sampling settings. Curves are drawn for the tests that ask for ``plots``: a run ends with four of
    them, which take longer than its steps.
    """

    def build(
        trainer_class: type[SPMDPPOTrainer] = SPMDPPOTrainer,
        reward_fn: Any = even_digits,
        model_options: Any = None,
        generate: Any = None,
        plots: bool = False,
        **settings: Any,
    ) -> Setup:
        config = StrategyConfig(
            **{
                "strategy": "fake",
                "engine_type": "hf",
                "rollout_batch_size": 4,
                "n_samples_per_prompt": 4,
                "train_batch_size": 8,
                "micro_train_batch_size": 4,
                "generate_max_len": 4,
                "prompt_max_len": 8,
                "actor_learning_rate": 1e-2,
                "critic_learning_rate": 1e-2,
                "lr_scheduler": "constant",
                "init_kl_coef": 0.0,
                "max_steps": 3,
                "num_episodes": 4,
                "plot_every": -1,
                "use_tensorboard": False,
                "enable_engine_sleep": False,
                "output_dir": str(tmp_path / "run"),
                **settings,
            }
        )
        strategy = FakeStrategy(args=config)
        options = {"packing_samples": config.packing_samples} if model_options is None else model_options
        tokenizer = build_tokenizer()
        records = [Record(dataclasses.asdict(e), str(i)) for i, e in enumerate(EXAMPLES)]
        prompts = PromptDataset(records, tokenizer, input_key="prompt")

        def policy() -> ActorLanguage:
            fused = {"fused_linear_logprob": config.fused_linear_logprob, "chunk_size": config.chunk_size}
            return ActorLanguage(build_model(layers=1, width=64), **(options | fused if options else {}))

        critic = None
        if config.advantage_estimator == "gae":
            critic = CriticLanguage(build_model(layers=1, width=64).model, **options)
        reference = policy() if config.init_kl_coef > 0 else None
        average = strategy.prepare_average(policy()) if config.enable_ema else None
        (actor, optim, schedule), (critic, critic_optim, critic_schedule), _, reference = (
            strategy.prepare_models_and_optimizers(policy(), critic, None, reference, config, max_steps=100)
        )
        strategy.setup_inference_engine(config, engine_type="hf", actor=actor)
        trainer = trainer_class(
            strategy,
            actor,
            critic,
            None,
            reference,
            average,
            optim,
            critic_optim,
            schedule,
            critic_schedule,
            tokenizer=tokenizer,
            reward_fn=reward_fn,
            **(generate or {}),
        )
        if not plots:
            trainer._plot = lambda: None
        loader = strategy.setup_dataloader(prompts, config.rollout_batch_size, collate_fn=prompts.collate_fn)
        return Setup(strategy, trainer, loader, prompts)

    return build
