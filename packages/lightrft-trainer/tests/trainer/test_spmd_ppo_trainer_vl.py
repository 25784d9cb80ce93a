from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

pytest.importorskip("torchvision", reason="Qwen2-VL's processor needs it: pip install torchvision")

from lightrft.data import PromptDataset, PromptFormat
from lightrft.data.records import Record
from lightrft.models import ActorVL
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.testing.tiny_models import save_tiny_model, tiny_image, tiny_processor
from lightrft.trainer import SPMDPPOTrainerVL
from lightrft.trainer.metrics import read_metrics

START = "<|im_start|>"  # the chat template begins with it


@pytest.fixture
def setup(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[SPMDPPOTrainerVL, Any, Any]:
    """A vision-language trainer; every third prompt has no image, one has two."""
    settings = dict(getattr(request, "param", {}))
    folder = save_tiny_model("qwen2_vl", tmp_path / "model")
    processor = tiny_processor("qwen2_vl")
    if settings.pop("adds_start_token", False):
        start = processor.tokenizer.convert_tokens_to_ids(START)
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, start)]
        )
        processor.save_pretrained(folder)
    config = StrategyConfig(
        **{
            "strategy": "fake",
            "engine_type": "hf",
            "pretrain": folder,
            "rollout_batch_size": 3,
            "n_samples_per_prompt": 2,
            "train_batch_size": 6,
            "micro_train_batch_size": 3,
            "generate_max_len": 4,
            "actor_learning_rate": 1e-3,
            "init_kl_coef": 0.0,
            "max_steps": 2,
            "plot_every": -1,
            "use_tensorboard": False,
            "enable_engine_sleep": False,
            "output_dir": str(tmp_path / "run"),
            **settings,
        }
    )
    strategy = FakeStrategy(args=config)
    records = [
        Record({"input": f"what is {i} ?", "image": [tiny_image(i + k) for k in range(i % 3)]}, str(i))
        for i in range(9)
    ]
    prompts = PromptDataset(
        records, processor, label_key=None, images_key="image", prompt_format=PromptFormat(apply_chat_template=True)
    )
    (actor, optimizer, scheduler), *_ = strategy.prepare_models_and_optimizers(
        ActorVL(folder), None, None, None, config, max_steps=10
    )
    strategy.setup_inference_engine(config, engine_type="hf")
    trainer = SPMDPPOTrainerVL(
        strategy,
        actor,
        None,
        None,
        None,
        None,
        optimizer,
        None,
        scheduler,
        None,
        tokenizer=processor.tokenizer,
        processor=processor,
        reward_fn=lambda prompts, responses, labels: [float(i % 2) for i in range(len(responses))],
    )
    return trainer, strategy.setup_dataloader(prompts, 3, collate_fn=prompts.collate_fn), prompts


def test_images_reach_the_engine_and_the_training_pass(setup: tuple[SPMDPPOTrainerVL, Any, Any]) -> None:
    trainer, loader, _ = setup
    vision = {name: value.clone() for name, value in trainer.actor.state_dict().items() if "visual" in name}
    assert vision
    trainer.fit(None, loader)
    lines = read_metrics(trainer.output_dir / "metrics.jsonl")
    assert len(lines) == 2
    # The same images, expanded alike: engine and trainer agree on every token's probability.
    assert all(line["logprob_drift_max"] < 1e-4 for line in lines)
    after = trainer.actor.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in vision.items())


@pytest.mark.parametrize("setup", [{"adds_start_token": True}], indirect=True)
def test_the_chat_template_s_own_special_tokens_are_not_doubled(setup: tuple[SPMDPPOTrainerVL, Any, Any]) -> None:
    trainer, _, prompts = setup
    tokenizer = trainer.tokenizer
    start, image = (tokenizer.convert_tokens_to_ids(name) for name in (START, "<|image_pad|>"))
    assert tokenizer("a")["input_ids"][0] == start
    maker = trainer.experience_maker
    outputs = maker.generate([prompts[i] for i in range(3)], maker.sampling, step=0)
    for output, prompt in zip(outputs[:: maker.sampling.n], prompts, strict=False):
        assert output.prompt_token_ids.count(start) == prompt.prompt_token_ids.count(start)
        rest = [token for token in output.prompt_token_ids if token != image]
        assert rest == [token for token in prompt.prompt_token_ids if token != image]


@pytest.mark.parametrize("setup", [{"max_epochs": 2, "train_batch_size": 3}], indirect=True)
def test_images_survive_a_checkpoint_in_the_middle_of_a_buffer(
    setup: tuple[SPMDPPOTrainerVL, Any, Any], tmp_path: Path
) -> None:
    trainer, loader, _ = setup

    class Asked:
        left = 2

        @property
        def asked(self) -> bool:
            self.left -= 1
            return self.left < 0

    state = trainer.fit(None, loader, interruption=Asked())  # type: ignore[arg-type]
    assert state.training
    before = {index: sample.images for index, sample in trainer.replay_buffer.samples.items()}
    trainer.fit(None, loader, resume=True)
    assert trainer.state.step == 2
    assert any(before.values())


def test_evaluation_answers_prompts_with_images(setup: tuple[SPMDPPOTrainerVL, Any, Any]) -> None:
    trainer, _, prompts = setup
    trainer.strategy.update_engine_weights(trainer.actor)
    assert trainer.evaluate([prompts[i] for i in range(4)]).count == 4


def test_samples_share_the_images_of_their_prompt_and_of_no_other(setup: tuple[SPMDPPOTrainerVL, Any, Any]) -> None:
    """Also where another dataset's prompt has the same number, as in an evaluation between two rollouts."""
    trainer, _, prompts = setup
    maker = trainer.experience_maker
    one_image, two_images = prompts[1], replace(prompts[2], index=1)
    outputs = maker.generate([one_image, two_images], maker.sampling, step=0)
    first, second, other = (maker.to_sample(outputs[i], p) for i, p in enumerate((one_image, one_image, two_images)))
    assert first.images is second.images
    assert [len(sample.images["image_grid_thw"]) for sample in (second, other)] == [1, 2]


def test_a_processor_is_needed(setup: tuple[SPMDPPOTrainerVL, Any, Any]) -> None:
    t = setup[0]
    with pytest.raises(ValueError, match="pass processor="):
        SPMDPPOTrainerVL(
            t.strategy, t.actor, None, None, None, None, t.actor_optim, None, None, None, tokenizer=t.tokenizer
        )
