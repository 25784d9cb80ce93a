"""The documents' examples, as literally as a process without backends or engines of other packages allows.

A FakeStrategy stands in for the backend that an example names, and its minimal engine for vLLM and SGLang. Examples
that construct a trainer are tests of lightrft-trainer; those that need FSDP2 itself, of lightrft-fsdp.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.strategy import EngineStatus, StrategyConfig, get_strategy
from lightrft.strategy.errors import PluginError
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.utils import add_arguments


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--strategy", "fake", "--train_batch_size", "1", "--actor_learning_rate", "0.1"])


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def compute_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.sum(-1, keepdim=True)).square().mean()


# ---- README ----------------------------------------------------------------------------------------------------------
def test_basic_usage(args: argparse.Namespace) -> None:
    actor, scheduler = net(), None
    torch.manual_seed(1)
    dataloader = [torch.randn(8, 4) for _ in range(40)]

    # Initialize strategy
    strategy = get_strategy(args)
    # Setup distributed environment
    strategy.setup_distributed()
    # Prepare models
    actor = strategy.prepare(actor, is_rlhf=True)
    # Create optimizer
    optimizer = strategy.create_optimizer(actor)
    # Training loop
    losses = []
    for batch in dataloader:
        loss = compute_loss(actor, batch)
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, scheduler)
        losses.append(loss.item())
    # Save checkpoint
    strategy.save_ckpt(actor, "checkpoints/step_1000")

    assert losses[-1] < losses[0] / 2
    restored = strategy.prepare(net(seed=5))
    strategy.load_ckpt(restored, "checkpoints/step_1000", load_module_only=True)
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), restored.parameters(), strict=True))


def test_configuration_management(args: argparse.Namespace) -> None:
    # Extract from args object
    config = StrategyConfig.from_args(args)
    # Access with type safety
    learning_rate = config.actor_learning_rate  # Type: float
    use_bf16 = config.bf16  # Type: bool
    assert (type(learning_rate), type(use_bf16)) == (float, bool)
    assert config.seed == 42


def test_configuration_driven_usage_names_the_package_that_is_missing() -> None:
    config = StrategyConfig(
        seed=42,
        max_norm=1.0,
        micro_train_batch_size=4,
        train_batch_size=32,
        bf16=True,
        fsdp=False,  # Use DeepSpeed
        zero_stage=2,
    )
    assert config.checked().backend == "deepspeed"
    try:
        strategy = get_strategy(config)
    except PluginError as error:
        named = 'pip install "lightrft-trainer[deepspeed]" (or lightrft-deepspeed alone)'
        assert named in str(error)  # noqa: PT017 - either is right
    else:
        assert strategy.name == "deepspeed"


def test_testing_with_fake_strategy() -> None:
    model = net()
    loss = compute_loss(model, torch.randn(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    # Use fake strategy for unit testing
    strategy = FakeStrategy()
    # All operations work without distributed environment
    strategy.setup_distributed()
    strategy.backward(loss, model, optimizer)
    strategy.save_ckpt(model, "test_checkpoints")

    assert list(Path("test_checkpoints").glob("*/manifest.json"))


def test_training_loop_of_a_unit_test() -> None:
    strategy = FakeStrategy()
    # Test your training code without distributed setup
    assert strategy.is_rank_0()


def test_switching_between_backends(args: argparse.Namespace) -> None:
    args.strategy = None
    args.fsdp = False
    args.zero_stage = 2
    assert StrategyConfig.from_args(args).checked().backend == "deepspeed"
    # Or use FSDP (just change one flag)
    args.fsdp = True
    assert StrategyConfig.from_args(args).checked().backend == "fsdp"


def test_consistent_logging(capsys: pytest.CaptureFixture[str]) -> None:
    strategy, step, loss = FakeStrategy(), 3, torch.tensor(0.5)
    strategy.print(f"Training step {step}, loss: {loss.item()}")
    assert capsys.readouterr().out == "Training step 3, loss: 0.5\n"


def test_inference_engine_integration() -> None:
    strategies = [FakeStrategy(), FakeStrategy()]
    for one, name in zip(strategies, ("vllm", "sglang"), strict=True):
        one.setup_inference_engine(one.args, engine_type=name)
    strategy = strategies[0]
    vllm_engine, sglang_engine = (one.inference_engine for one in strategies)
    # Engines can be put to sleep to save memory
    strategy.engines_sleep([vllm_engine, sglang_engine])
    assert [one.inference_engine_status for one in strategies] == [EngineStatus.SLEEPED] * 2
    # Wake them up when needed
    strategy.engines_wake_up([vllm_engine, sglang_engine])
    assert [one.inference_engine_status for one in strategies] == [EngineStatus.WAKEUP] * 2


def test_multi_model_preparation() -> None:
    strategy = FakeStrategy()
    actor, critic, reward_model, ref_model = given = tuple(net(seed) for seed in range(4))
    # Prepare multiple models at once for RLHF training
    actor, critic, reward_model, ref_model = strategy.prepare(actor, critic, reward_model, ref_model, is_rlhf=True)
    assert (actor, critic, reward_model, ref_model) == given


def test_custom_optimizer_creation() -> None:
    strategy, model = FakeStrategy(), net()
    # Create optimizers with strategy-specific optimizations
    optimizer = strategy.create_optimizer(model, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_extending_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrft.strategy import registry
    from lightrft.strategy.strategy_base import StrategyBase

    class MyCustomStrategy(StrategyBase):
        def setup_distributed(self, timeout: Any = None) -> None:
            pass

        def backward(self, loss: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
            pass

        # Implement other required methods...
        def create_optimizer(self, model: Any, **kwargs: Any) -> Any: ...
        def prepare(self, *models: Any, is_rlhf: bool = False, **kwargs: Any) -> Any: ...
        def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any = None, **kwargs: Any) -> Any: ...
        def save_ckpt(self, model: Any, save_dir: Any, **kwargs: Any) -> None: ...
        def load_ckpt(self, model: Any, load_dir: Any, **kwargs: Any) -> Any: ...

    monkeypatch.setattr(registry, "_registered", {"strategies": {}, "engines": {}})
    registry.register_strategy("mine", MyCustomStrategy)
    assert type(get_strategy({"strategy": "mine"})) is MyCustomStrategy


# ---- usage guide -----------------------------------------------------------------------------------------------------
def test_basic_setup_of_the_usage_guide(args: argparse.Namespace) -> None:
    strategy = get_strategy(args)
    # Setup inference engine for generation
    strategy.setup_inference_engine(args, engine_type="vllm")
    # Access the engine if needed
    vllm_engine = strategy.inference_engine
    assert vllm_engine is not None
    assert strategy.inference_engine_status is EngineStatus.WAKEUP


def test_standard_training_operations(args: argparse.Namespace) -> None:
    strategy = get_strategy(args)
    model = strategy.prepare(net())
    optimizer = strategy.create_optimizer(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loss = compute_loss(model, torch.randn(2, 4))
    local_value = loss.detach()

    # Backward pass
    strategy.backward(loss, model, optimizer)
    # Optimizer step with gradient clipping
    strategy.optimizer_step(optimizer, model, scheduler, name="actor")
    # Distributed communication
    averaged_value = strategy.all_reduce(local_value, op="mean")
    gathered_values = strategy.all_gather(local_value)

    assert torch.equal(averaged_value, local_value)
    assert gathered_values.tolist() == [local_value.item()]


class PlainTrainer:
    """What a trainer of the guide's examples inherits."""

    def __init__(self, strategy: FakeStrategy) -> None:
        self.strategy = strategy
        self.actor = strategy.prepare(net())
        self.actor_optim = strategy.create_optimizer(self.actor)

    def ppo_train(self, global_steps: int = 0) -> dict[str, float]:
        loss = compute_loss(self.actor, torch.ones(2, 4))
        self.strategy.backward(loss, self.actor, self.actor_optim)
        result = self.strategy.optimizer_step(self.actor_optim, self.actor, None)
        return {"grad_norm": result.grad_norm or 0.0}


class MyTrainer(PlainTrainer):
    def ppo_train(self, global_steps: int = 0) -> dict[str, float]:
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


def test_memory_optimized_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    strategy = FakeStrategy()
    strategy.setup_inference_engine(strategy.args, engine_type="vllm")
    trainer = MyTrainer(strategy)
    for version in (1, 2):
        assert trainer.ppo_train(0)["grad_norm"] > 0
        assert strategy.gather_and_generate({}, [[1]])[0].weight_version == version
    assert "PPO Train TIMECOST" in capsys.readouterr().out


def test_engine_weight_synchronization() -> None:
    strategy, actor = FakeStrategy(), net()
    strategy.setup_inference_engine(strategy.args, engine_type="vllm")
    # Update inference engine with latest actor weights
    receipt = strategy.update_engine_weights(actor)
    assert receipt.tensors_received == receipt.tensors_expected == 4


def test_text_generation() -> None:
    strategy = FakeStrategy()
    strategy.setup_inference_engine(strategy.args, engine_type="vllm")
    all_prompts, sampling_params = ["what is", "how"], {"max_tokens": 4}
    all_prompt_token_ids = [list(prompt.encode()) for prompt in all_prompts]
    # Generate responses with automatic distribution
    all_outputs = strategy.gather_and_generate(
        sampling_params=sampling_params,
        all_prompt_token_ids=all_prompt_token_ids,
        sleep_engine=True,  # Automatically sleep engine after generation
    )
    assert [output.prompt_token_ids for output in all_outputs] == all_prompt_token_ids
    assert strategy.inference_engine_status is EngineStatus.SLEEPED


def test_multimodal_generation() -> None:
    strategy = FakeStrategy()
    strategy.setup_inference_engine(strategy.args, engine_type="vllm")
    all_prompts, all_images, images_num = ["a <image>", "no image", "<image><image>"], ["x", "y", "z"], [1, 0, 2]
    # Generate with multimodal inputs
    all_outputs = strategy.gather_and_generate(
        sampling_params={"max_tokens": 3},
        all_prompts=all_prompts,  # Text prompts
        all_images=all_images,  # Image data
        images_num=images_num,  # Number of images per prompt
        sleep_engine=True,
    )
    assert len(all_outputs) == 3


def test_engine_sleep_and_wake_mechanism(args: argparse.Namespace) -> None:
    strategy = get_strategy(args)
    strategy.setup_inference_engine(args, engine_type="vllm")  # Creates and wakes engine
    assert strategy.inference_engine_status is EngineStatus.WAKEUP
    strategy.maybe_sleep_inference_engine()  # Sleep to save memory
    assert strategy.inference_engine_status is EngineStatus.SLEEPED
    strategy.wakeup_inference_engine()  # Wake for generation
    assert strategy.inference_engine_status is EngineStatus.WAKEUP


def test_required_arguments() -> None:
    # Create parser
    parser = argparse.ArgumentParser()
    # Add LightRFT arguments
    add_arguments(parser)
    # Parse arguments
    args = parser.parse_args([])
    assert args.engine_type == "vllm"


def test_custom_reward_models(args: argparse.Namespace) -> None:
    reward_model_1, reward_model_2, reward_model_3 = (net(seed) for seed in range(3))
    # Multiple reward models
    reward_models = [reward_model_1, reward_model_2, reward_model_3]
    strategy = get_strategy(args)
    # Models are automatically sharded across GPUs
    prepared_rms = [strategy.prepare_model(rm, shard_size=8) for rm in reward_models]
    assert not any(p.requires_grad for rm in prepared_rms for p in rm.parameters())


def test_debugging_and_monitoring(args: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = get_strategy(args)
    figures = strategy.report_memory(prefix="checkpoint_name")
    assert "checkpoint_name" in capsys.readouterr().out
    assert figures["rss"] > 0
    assert strategy.inference_engine_status is EngineStatus.SLEEPED


def test_length_distribution_is_plotted_every_so_many_steps(args: argparse.Namespace) -> None:
    args.plot_every, args.log_dir = 2, "logs"
    strategy = get_strategy(args)
    strategy.setup_inference_engine(args, engine_type="vllm")
    for _ in range(5):
        strategy.gather_and_generate({"max_tokens": 4}, [[1, 2], [3]])
    assert sorted(path.name for path in Path("logs", "plots").iterdir()) == [
        "response_lengths_000002.png",
        "response_lengths_000004.png",
    ]


def test_the_api_reference_names_exist() -> None:
    import lightrft.strategy.strategy_base
    import lightrft.utils

    assert lightrft.strategy.strategy_base.StrategyBase
    assert lightrft.strategy.get_strategy
    assert lightrft.utils.add_arguments
