"""The usage guide's examples with the real vLLM, literally but for what a CPU cannot do, on two ranks.

Without vLLM these are skipped: ``uv run nox -s vllm_integration`` brings it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightrft.data import PromptDataset
from lightrft.data.records import Record
from lightrft.data.tasks import build_default_model, build_tokenizer, reverse_digits
from lightrft.models import ActorLanguage
from lightrft.strategy import EngineStatus, get_strategy
from lightrft.testing import RankPool
from lightrft.testing.tiny_models import save_tiny_model, tiny_image, tiny_model
from lightrft.trainer import SPMDPPOTrainer
from lightrft.utils import add_arguments

pytest.importorskip("vllm", reason="vLLM is not installed: uv run nox -s vllm_integration brings it")

SETTINGS: Mapping[str, Any] = {
    "engine_type": "vllm",
    "engine_mem_util": 0.85,
    "micro_train_batch_size": 4,
    "train_batch_size": 16,
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 4,
    "max_steps": 2,
    "prompt_max_len": 8,
    "generate_max_len": 5,
    "init_kl_coef": 0,
    "plot_every": -1,
    "max_model_len": 32,
}


def parsed(*flags: str) -> argparse.Namespace:
    # Create parser
    parser = argparse.ArgumentParser()
    # Add LightRFT arguments
    add_arguments(parser)
    # Parse arguments
    args = parser.parse_args(flags)
    args.engine_extra = {"kv_cache_memory_bytes": 8 * 2**20}  # the CPU's share; a GPU takes --engine_mem_util
    return args


class MyTrainer(SPMDPPOTrainer):
    def ppo_train(self, global_steps: int = 0) -> dict[str, float]:
        # torch.cuda.synchronize(): there is none here
        train_begin = time.time()
        # Load optimizer states from CPU to GPU (FSDP only)
        self.strategy.maybe_load_optimizer(self.actor_optim)
        # Perform training
        train_ret = super().ppo_train(global_steps)
        # Offload optimizer states from GPU to CPU (FSDP only)
        self.strategy.maybe_offload_optimizer(self.actor_optim)
        self.strategy.print(f"PPO Train TIMECOST {time.time() - train_begin}")
        # Synchronize actor weights to inference engine
        self.strategy.update_engine_weights(self.actor)
        return train_ret


def usage_guide(folder: str, output_dir: str) -> None:
    """Basic setup, memory-optimized training, text generation and the sleep of engines: one engine over two ranks."""
    settings = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    args = parsed(
        *("--fsdp", "--enable_engine_sleep", "--engine_tp_size", "2", "--pretrain", folder),
        *("--output_dir", output_dir, *settings),
    )

    # Create strategy (automatically selects DeepSpeed or FSDP based on args)
    strategy = get_strategy(args)
    # Setup inference engine for generation
    strategy.setup_inference_engine(args, engine_type="vllm")
    # Access the engine if needed
    vllm_engine = strategy.inference_engine
    assert vllm_engine is not None
    assert (vllm_engine.name, strategy.inference_engine_status) == ("vllm", EngineStatus.WAKEUP)

    # Engine lifecycle management
    strategy.maybe_sleep_inference_engine()  # Sleep to save memory
    assert strategy.inference_engine_status is EngineStatus.SLEEPED
    strategy.wakeup_inference_engine()  # Wake for generation
    assert strategy.inference_engine_status is EngineStatus.WAKEUP

    actor = ActorLanguage(args.pretrain)
    (actor, actor_optim, actor_scheduler), (critic, critic_optim, critic_scheduler), reward_model, initial_model = (
        strategy.prepare_models_and_optimizers(actor, None, None, None, args, 2)
    )
    # Update inference engine with latest actor weights
    receipt = strategy.update_engine_weights(actor)
    assert receipt.tensors_received == receipt.tensors_expected

    # Create trainer
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
    state = trainer.fit(args, strategy.setup_dataloader(prompts, 2, collate_fn=prompts.collate_fn))
    assert state.step == 2

    # Tokenize prompts (without padding for efficiency); each rank brings its own
    all_prompts = [["12=", "345="], ["6789="]][strategy.rank]
    all_prompt_token_ids = trainer.tokenize_fn(all_prompts, trainer.prompt_max_len, padding=False)["input_ids"]
    # Generate responses with automatic distribution
    all_outputs = strategy.gather_and_generate(
        sampling_params={"max_tokens": 3, "n": 2},
        all_prompt_token_ids=all_prompt_token_ids,
        sleep_engine=True,  # Automatically sleep engine after generation
    )
    if dist.get_rank(trainer.vllm_mp_group) == 0:
        strategy.print(f"Generated {len(all_outputs)} outputs")
    assert [list(output.prompt_token_ids) for output in all_outputs[::2]] == all_prompt_token_ids
    assert {output.weight_version for output in all_outputs} == {strategy.engine_host.weight_version}
    assert strategy.inference_engine_status is EngineStatus.SLEEPED

    # Engines can be put to sleep to save memory; the second is one that may stand in vLLM's environment
    other = get_strategy({"fsdp": True, "engine_type": "hf", "pretrain": folder, "train_batch_size": 2})
    other.setup_inference_engine(other.args, engine_type="hf")
    engines = [vllm_engine, other.inference_engine]
    strategy.engines_wake_up(engines)
    assert [engine.status().status for engine in engines if engine] == [EngineStatus.WAKEUP] * 2
    strategy.engines_sleep(engines)
    assert [engine.status().status for engine in engines if engine] == [EngineStatus.SLEEPED] * 2
    # Wake them up when needed
    strategy.engines_wake_up(engines)
    assert [engine.status().status for engine in engines if engine] == [EngineStatus.WAKEUP] * 2
    other.engine_host.shutdown()
    strategy.engine_host.shutdown()


def test_the_usage_guide_on_one_engine_of_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(usage_guide, str(build_default_model(tmp_path / "model")), str(tmp_path / "run"))
    assert "PPO Train TIMECOST" in ranks.output(0)
    assert "Generated 4 outputs" in ranks.output(0)


def multimodal(folder: str) -> list[list[int]]:
    """The guide's multimodal generation: an engine a rank, whose ranks bring other numbers of images."""
    args = parsed("--fsdp", "--engine_type", "vllm", "--train_batch_size", "2", "--pretrain", folder)
    args.max_model_len, args.prompt_max_len = 256, 64
    strategy = get_strategy(args)
    actor = strategy.prepare_model(tiny_model("qwen2_vl", seed=1))
    strategy.setup_inference_engine(args, engine_type="vllm", actor=actor)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    all_prompts = [[place + "one", "none at all", place + place + "two"], ["none at all"]][strategy.rank]
    all_images = [[tiny_image(0), tiny_image(1), tiny_image(2)], []][strategy.rank]
    images_num = [[1, 0, 2], [0]][strategy.rank]
    # Generate with multimodal inputs
    all_outputs = strategy.gather_and_generate(
        sampling_params={"temperature": 0.0, "max_tokens": 4},
        all_prompts=all_prompts,  # Text prompts
        all_images=all_images,  # Image data
        images_num=images_num,  # Number of images per prompt
        sleep_engine=True,
    )
    assert strategy.inference_engine_status is EngineStatus.SLEEPED
    strategy.engine_host.shutdown()
    return [list(output.output_token_ids) for output in all_outputs]


def test_multimodal_generation(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(multimodal, save_tiny_model("qwen2_vl", tmp_path / "vlm"))
    assert [len(part) for part in (first, second)] == [3, 1]
    assert first[1] == second[0], "the same prompt without an image"
    assert torch.tensor([tokens[:4] for tokens in first]).unique(dim=0).shape[0] > 1
