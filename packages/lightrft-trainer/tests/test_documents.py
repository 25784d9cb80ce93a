"""The documents' examples that construct a trainer or need FSDP2, as literally as a CPU allows."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightrft.data import PromptDataset
from lightrft.data.records import Record
from lightrft.data.tasks import build_model, build_tokenizer, reverse_digits
from lightrft.models import ActorLanguage
from lightrft.strategy import EngineStatus, get_strategy
from lightrft.trainer import SPMDPPOTrainer
from lightrft.utils import add_arguments

FLAGS = "--fsdp --engine_type hf --max_steps 1 --rollout_batch_size 4 --n_samples_per_prompt 2 --train_batch_size 8 \
--generate_max_len 4 --prompt_max_len 8 --init_kl_coef 0 --plot_every -1 --num_episodes 1"


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    build_model(layers=1, width=64).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(
        [*FLAGS.split(), "--pretrain", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")]
    )


@pytest.fixture(autouse=True)
def _leave_no_process_group() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class MyTrainer(SPMDPPOTrainer):
    """The usage guide's memory-optimized training."""

    def ppo_train(self, global_steps=0):
        torch.cuda.synchronize()
        train_begin = time.time()

        # Load optimizer states from CPU to GPU (FSDP only)
        self.strategy.maybe_load_optimizer(self.actor_optim)

        # Perform training
        train_ret = super().ppo_train(global_steps)

        # Offload optimizer states from GPU to CPU (FSDP only)
        self.strategy.maybe_offload_optimizer(self.actor_optim)

        torch.cuda.synchronize()
        self.strategy.print(f"PPO Train TIMECOST {time.time() - train_begin}")

        # Synchronize actor weights to inference engine
        self.strategy.update_engine_weights(self.actor)

        return train_ret

    def generate(self, all_prompts, sampling_params):
        """The usage guide's text generation in an experience maker."""
        # Tokenize prompts (without padding for efficiency)
        all_prompt_token_ids = self.tokenize_fn(all_prompts, self.prompt_max_len, padding=False)["input_ids"]

        # Generate responses with automatic distribution
        all_outputs = self.strategy.gather_and_generate(
            sampling_params=sampling_params,
            all_prompt_token_ids=all_prompt_token_ids,
            sleep_engine=True,  # Automatically sleep engine after generation
        )
        if dist.get_rank(self.vllm_mp_group) == 0:
            self.strategy.print(f"Generated {len(all_outputs)} outputs")
        return all_outputs


def test_basic_setup_and_memory_optimized_training_on_fsdp(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    # Create strategy (automatically selects DeepSpeed or FSDP based on args)
    strategy = get_strategy(args)
    # Setup inference engine for generation
    strategy.setup_inference_engine(args, engine_type="hf")
    # Access the engine if needed
    engine = strategy.inference_engine
    assert engine is not None
    assert strategy.inference_engine_status is EngineStatus.WAKEUP

    actor = ActorLanguage(args.pretrain)
    (actor, actor_optim, actor_scheduler), (critic, critic_optim, critic_scheduler), reward_model, initial_model = (
        strategy.prepare_models_and_optimizers(actor, None, None, None, args, 10)
    )
    tokenizer = build_tokenizer()
    trainer = MyTrainer(
        strategy=strategy,
        actor=actor,
        critic=critic,
        reward_model=reward_model,
        initial_model=initial_model,
        ema_model=None,
        actor_optim=actor_optim,
        critic_optim=critic_optim,
        actor_scheduler=actor_scheduler,
        critic_scheduler=critic_scheduler,
        tokenizer=tokenizer,
        reward_fn=lambda prompts, responses, labels, **extras: [float("1" in response) for response in responses],
    )
    records = [Record(dataclasses.asdict(e), str(i)) for i, e in enumerate(reverse_digits().train[:8])]
    prompts = PromptDataset(records, tokenizer, input_key="prompt")
    before = [parameter.detach().clone() for parameter in actor.parameters()]
    trainer.fit(args, strategy.setup_dataloader(prompts, 4, collate_fn=prompts.collate_fn))

    assert "PPO Train TIMECOST" in capsys.readouterr().out
    assert any(not torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))
    outputs = trainer.generate(["12=", "345="], {"max_tokens": 3, "n": 2})
    assert [output.prompt_token_ids for output in outputs[::2]] == tokenizer(["12=", "345="])["input_ids"]
    assert {output.weight_version for output in outputs} == {strategy.engine_host.weight_version}
    assert strategy.inference_engine_status is EngineStatus.SLEEPED


def test_switching_to_fsdp_is_one_flag(args: argparse.Namespace) -> None:
    args.fsdp = True
    strategy = get_strategy(args)
    assert strategy.name == "fsdp"
    assert strategy.args is args


def test_custom_reward_models_are_sharded_over_the_ranks_there_are(args: argparse.Namespace) -> None:
    reward_models = [build_model(layers=1, width=64) for _ in range(3)]
    strategy = get_strategy(args)
    # Models are automatically sharded across GPUs
    prepared_rms = [strategy.prepare_model(rm, shard_size=8) for rm in reward_models]
    assert len(prepared_rms) == 3
    assert not any(parameter.requires_grad for rm in prepared_rms for parameter in rm.parameters())
