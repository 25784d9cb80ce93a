"""Models built without memory where DeepSpeed has ways of its own: frozen ones, and bf16 masters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.strategy import StrategyBase
from lightrft.testing import save_tiny_model, tiny_model

SETTINGS = {"seed": 3, "dist_timeout": 60.0, "micro_train_batch_size": 1, "train_batch_size": 2}
ROWS = torch.arange(7, 15)[None]

on_each_stage = pytest.mark.parametrize("stage", [1, 3])  # to stage 2 parameters are what they are to stage 1


def build(strategy: StrategyBase, config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with strategy.init_model_context(meta_init=True):
        model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS).logits.float()


def state(strategy: StrategyBase, model: nn.Module) -> dict[str, torch.Tensor]:
    return {item.name: item.weight for item in strategy.iter_state(model)}


def frozen_from_a_folder(folder: str, stage: int, shard_size: int) -> torch.Tensor:
    from transformers import AutoConfig

    strategy = DeepspeedStrategy(zero_stage=stage, **SETTINGS)
    model = strategy.prepare_model(build(strategy, AutoConfig.from_pretrained(folder)), shard_size=shard_size)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return logits(model)


@on_each_stage
@pytest.mark.parametrize("shard_size", [1, 2])
def test_a_frozen_model_is_read_from_its_folder(ranks: Any, tmp_path: Path, stage: int, shard_size: int) -> None:
    folder = save_tiny_model("qwen2_tied", tmp_path / "model")
    expected = logits(tiny_model("qwen2_tied"))
    for found in ranks.run(frozen_from_a_folder, folder, stage, shard_size):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def with_secondary_shards(folder: str) -> tuple[torch.Tensor, ...]:
    """Logits of a frozen model, of one before and after a step, and of its weights in one process."""
    from transformers import AutoConfig

    strategy, config = DeepspeedStrategy(zero_stage=3, zpg=2, **SETTINGS), AutoConfig.from_pretrained(folder)
    frozen = strategy.prepare_model(build(strategy, config))
    model = strategy.prepare(build(strategy, config))
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    before = logits(model)
    strategy.backward(model(input_ids=ROWS, labels=ROWS).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model, None)
    plain = tiny_model("qwen2_tied")
    plain.load_state_dict({**plain.state_dict(), **state(strategy, model)})
    return logits(frozen), before, logits(model), logits(plain)


def test_secondary_shards_hold_what_was_read(ranks: Any, tmp_path: Path) -> None:
    expected = logits(tiny_model("qwen2_tied"))
    for frozen, before, after, plain in ranks.run(
        with_secondary_shards, save_tiny_model("qwen2_tied", tmp_path / "model")
    ):
        torch.testing.assert_close((frozen, before, after), (expected, expected, plain), atol=1e-5, rtol=1e-5)


def keeps_its_optimizer(folder: str, stage: int, bf16: bool) -> None:
    """An optimizer that was made while the model had no memory trains it."""
    from transformers import AutoConfig

    strategy = DeepspeedStrategy(zero_stage=stage, bf16=bf16, **SETTINGS)
    model = build(strategy, AutoConfig.from_pretrained(folder))
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    model, _, _ = strategy.prepare((model, optimizer, None))
    before = state(strategy, model)
    strategy.backward(model(input_ids=ROWS, labels=ROWS).loss, model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped
    after = state(strategy, model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    inner = strategy.unwrap_model(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()  # type: ignore[operator]
    assert embedding.weight is head.weight, "tied embeddings stay tied"


@on_each_stage
@pytest.mark.parametrize("bf16", [False, True])
def test_an_optimizer_made_on_the_meta_model_trains_the_filled_one(
    ranks: Any, tmp_path: Path, stage: int, bf16: bool
) -> None:
    ranks.run(keeps_its_optimizer, save_tiny_model("qwen2_tied", tmp_path / "model"), stage, bf16)
