"""The documents' examples under their default backend, word for word, on two ranks.

What FSDP alone offers in the documents (loading and offloading optimizer states) does its work here too. Examples that
construct a trainer are tests of lightrft-trainer; switching backends is a test of the integration session.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.utils import add_arguments

DATA = torch.randn(40, 8, 4, generator=torch.Generator().manual_seed(1))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def parse(*flags: str) -> argparse.Namespace:
    # Create parser
    parser = argparse.ArgumentParser()
    # Add LightRFT arguments
    add_arguments(parser)
    # Parse arguments
    return parser.parse_args([*flags])


# ---- README ----------------------------------------------------------------------------------------------------------
def basic_usage(folder: str, *flags: str) -> None:
    os.chdir(folder)
    args = parse(*flags, "--train_batch_size", "2", "--actor_learning_rate", "0.1")
    actor, scheduler, dataloader, losses = net(), None, DATA, []

    def compute_loss(batch: torch.Tensor) -> torch.Tensor:
        loss = (actor(batch) - batch.sum(-1, keepdim=True)).square().mean()
        losses.append(loss.item())
        return loss

    from lightrft.strategy import get_strategy

    # Initialize strategy
    strategy = get_strategy(args)

    # Setup distributed environment
    strategy.setup_distributed()

    # Prepare models
    actor = strategy.prepare(actor, is_rlhf=True)

    # Create optimizer
    optimizer = strategy.create_optimizer(actor)

    # Training loop
    for batch in dataloader:
        loss = compute_loss(batch)
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, scheduler)

    # Save checkpoint
    strategy.save_ckpt(actor, "checkpoints/step_1000")

    assert strategy.name == "deepspeed", "the default"
    assert losses[-1] < losses[0] / 2
    restored = strategy.prepare(net(seed=5))
    strategy.load_ckpt(restored, "checkpoints/step_1000", load_module_only=True)
    found = {item.name: item.weight for item in strategy.iter_state(restored)}
    for item in strategy.iter_state(actor):
        assert torch.equal(found[item.name], item.weight), item.name


def test_basic_usage_trains_under_deepspeed_by_default(ranks: Any, tmp_path: Path) -> None:
    ranks.run(basic_usage, str(tmp_path))


def test_basic_usage_trains_on_stage_3(ranks: Any, tmp_path: Path) -> None:
    ranks.run(basic_usage, str(tmp_path), "--zero_stage", "3")


def configuration_driven_usage() -> None:
    from lightrft.strategy import get_strategy
    from lightrft.strategy.config import StrategyConfig

    # Create typed configuration
    config = StrategyConfig(
        seed=42,
        max_norm=1.0,
        micro_train_batch_size=4,
        train_batch_size=32,
        bf16=True,
        fsdp=False,  # Use DeepSpeed
        zero_stage=2,
    )

    # Create strategy from configuration
    strategy = get_strategy(config)

    assert (strategy.name, strategy.config.zero_stage, strategy.args) == ("deepspeed", 2, config)
    actor = strategy.prepare(net())
    optimizer = strategy.create_optimizer(actor)
    for micro_batch in range(4):  # 32 = 4 samples × 2 ranks × 4
        loss = actor(torch.ones(4, 4, dtype=torch.bfloat16)).square().mean()
        strategy.backward(loss, actor, optimizer)
        result = strategy.optimizer_step(optimizer, actor, None)
        assert result.stepped == (micro_batch == 3)


def test_configuration_driven_usage(ranks: Any) -> None:
    ranks.run(configuration_driven_usage)


def multi_model_preparation(stage: int) -> None:
    from lightrft.strategy import get_strategy

    strategy = get_strategy({"zero_stage": stage, "train_batch_size": 2})
    actor, critic, reward_model, ref_model = given = tuple(net(seed) for seed in range(4))
    plain = [net(seed) for seed in range(4)]

    actor, critic, reward_model, ref_model = strategy.prepare(actor, critic, reward_model, ref_model, is_rlhf=True)

    for model, original, expected in zip((actor, critic, reward_model, ref_model), given, plain, strict=True):
        assert strategy.unwrap_model(model) is original
        torch.testing.assert_close(model(DATA[0]), expected(DATA[0]))


def test_multi_model_preparation_keeps_the_order(ranks: Any) -> None:
    for stage in (1, 2, 3):
        ranks.run(multi_model_preparation, stage)


def custom_optimizer_creation(stage: int) -> None:
    from lightrft.strategy import get_strategy

    strategy = get_strategy({"zero_stage": stage, "train_batch_size": 2})
    model = strategy.prepare(net())

    optimizer = strategy.create_optimizer(model, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)

    assert {group["lr"] for group in optimizer.param_groups} == {1e-5}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_custom_optimizer_creation(ranks: Any) -> None:
    for stage in (1, 3):
        ranks.run(custom_optimizer_creation, stage)


# ---- usage guide -----------------------------------------------------------------------------------------------------
def custom_reward_models(*flags: str) -> None:
    from lightrft.strategy import get_strategy

    args = parse(*flags, "--train_batch_size", "2")
    reward_model_1, reward_model_2, reward_model_3 = (net(seed) for seed in range(3))

    # Multiple reward models
    reward_models = [reward_model_1, reward_model_2, reward_model_3]

    strategy = get_strategy(args)
    # Models are automatically sharded across GPUs
    prepared_rms = [strategy.prepare_model(rm, shard_size=8) for rm in reward_models]

    for seed, rm in enumerate(prepared_rms):
        assert not any(parameter.requires_grad for parameter in rm.parameters())
        torch.testing.assert_close(rm(DATA[0]), net(seed)(DATA[0]))


def test_custom_reward_models_are_sharded_over_the_ranks_there_are(ranks: Any) -> None:
    ranks.run(custom_reward_models)
    ranks.run(custom_reward_models, "--zero_stage", "3")


def training_operations(*flags: str) -> None:
    from lightrft.strategy import get_strategy

    strategy = get_strategy(parse(*flags, "--train_batch_size", "2"))
    model = strategy.prepare(net())
    optimizer = strategy.create_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    loss, local_value = model(DATA[0]).square().mean(), float(strategy.get_rank())
    strategy.maybe_load_optimizer(optimizer)  # before any offload: nothing to do

    # Backward pass
    strategy.backward(loss, model, optimizer)

    # Optimizer step with gradient clipping
    strategy.optimizer_step(optimizer, model, scheduler, name="actor")

    # Distributed communication
    averaged_value = strategy.all_reduce(local_value, op="mean")
    gathered_values = strategy.all_gather(local_value)

    assert (averaged_value, gathered_values) == (0.5, [0.0, 1.0])
    assert scheduler.last_epoch == 1
    strategy.maybe_offload_optimizer(optimizer)
    strategy.maybe_load_optimizer(optimizer)
    assert "rss" in strategy.report_memory(prefix="checkpoint_name")


def test_training_operations(ranks: Any) -> None:
    for stage in ("1", "2", "3"):
        ranks.run(training_operations, "--zero_stage", stage)
