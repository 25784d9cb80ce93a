"""The documents' example of switching backends, word for word, with the documents' training loop after it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.strategy.schedules import make_scheduler
from lightrft.testing import RankPool, tiny_model, tiny_tokenizer
from lightrft.utils import add_arguments

STEPS = 6
FLAGS = "--micro_train_batch_size 2 --train_batch_size 8 --max_norm 1.0 --actor_learning_rate 1e-3 --engine_type hf"


def train(strategy: Any, folder: Path) -> list[float]:
    """The documents' basic usage; returns each step's loss and leaves the model in ``folder``."""
    # Setup distributed environment
    strategy.setup_distributed()

    # Prepare models
    actor = tiny_model()
    actor = strategy.prepare(actor, is_rlhf=True)

    # Create optimizer
    optimizer = strategy.create_optimizer(actor)
    scheduler = make_scheduler("cosine", optimizer, STEPS, 0.2)

    def compute_loss(batch: torch.Tensor) -> torch.Tensor:
        logits = actor(input_ids=batch).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    count = STEPS * strategy.accumulated_gradient
    rows = [torch.randint(7, 512, (10,), generator=torch.Generator().manual_seed(i)) for i in range(4 * count)]
    dataloader = strategy.setup_dataloader(rows, 2, shuffle=False)

    # Training loop
    losses = []
    for batch in dataloader:
        loss = compute_loss(batch.to(strategy.device))
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, scheduler)
        losses.append(strategy.all_reduce(loss.item()))

    # Save checkpoint
    strategy.save_ckpt(actor, folder / "checkpoints/step_1000")
    strategy.save_model(actor, tiny_tokenizer(), folder / "model")
    return losses


def switch(folder: Path) -> dict[str, list[float]]:
    """Both backends in one process."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(FLAGS.split())
    losses = {}

    # Use DeepSpeed
    args.fsdp = False
    args.zero_stage = 2
    strategy = get_strategy(args)

    losses[strategy.name] = train(strategy, folder / strategy.name)

    # Or use FSDP (just change one flag)
    args.fsdp = True
    strategy = get_strategy(args)

    # Rest of your code remains unchanged!
    losses[strategy.name] = train(strategy, folder / strategy.name)
    return losses


def test_one_flag_switches_the_backend_and_nothing_else(ranks: RankPool, tmp_path: Path) -> None:
    for losses in ranks.run(switch, tmp_path):
        assert list(losses) == ["deepspeed", "fsdp"]
        assert len(losses["fsdp"]) == 2 * STEPS
        torch.testing.assert_close(losses["deepspeed"], losses["fsdp"], atol=5e-6, rtol=0)
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("deepspeed", "fsdp")
    )
    start = tiny_model().state_dict()
    assert mine.keys() == theirs.keys() == start.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-5, rtol=0)
    assert max((mine[name] - start[name]).abs().max() for name in mine) > 1e-3, "they trained"


def configured() -> tuple[str, int, int, bool]:
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

    actor = strategy.prepare(tiny_model(), is_rlhf=True)
    optimizer = strategy.create_optimizer(actor, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    steps = 0
    for index in range(2 * strategy.accumulated_gradient):
        rows = torch.randint(7, 512, (4, 10), generator=torch.Generator().manual_seed(index))
        loss = actor(input_ids=rows, labels=rows).loss
        strategy.backward(loss, actor, optimizer)
        steps += strategy.optimizer_step(optimizer, actor, None, name="actor").stepped
    return strategy.name, strategy.accumulated_gradient, steps, strategy.args is config


def test_the_documents_typed_configuration_trains_under_deepspeed(ranks: RankPool) -> None:
    assert ranks.run(configured) == [("deepspeed", 4, 2, True)] * 2
