"""Models built without memory: filled from files, by initialisation, or not at all, and then they say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.strategy import FakeStrategy, StrategyBase, UnfilledModelError
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import save_tiny_model, tiny_model
from lightrft.testing.tiny_models import tiny_config

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


def from_a_folder(folder: str, stage: int, shard_size: int | None) -> torch.Tensor:
    from transformers import AutoConfig

    strategy = DeepspeedStrategy(zero_stage=stage, **SETTINGS)
    model = build(strategy, AutoConfig.from_pretrained(folder))
    model = strategy.prepare_model(model, shard_size=shard_size, is_training=shard_size is None)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return logits(model)


@on_each_stage
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
@pytest.mark.parametrize("shard_size", [None, 1])
def test_a_configuration_that_names_a_folder_is_read_from_there(
    ranks: Any, tmp_path: Path, kind: str, stage: int, shard_size: int | None
) -> None:
    folder = save_tiny_model(kind, tmp_path / "model")
    expected = logits(tiny_model(kind))
    for found in ranks.run(from_a_folder, folder, stage, shard_size):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def from_scratch(kind: str, stage: int) -> None:
    strategy, fake = DeepspeedStrategy(zero_stage=stage, **SETTINGS), FakeStrategy(**SETTINGS)
    torch.manual_seed(strategy.rank)  # whatever was drawn before must not matter
    model = strategy.prepare(build(strategy, tiny_config(kind)))
    assert logits(model).isfinite().all()
    expected = state(fake, fake.prepare(build(fake, tiny_config(kind))))
    found = state(strategy, model)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@on_each_stage
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
def test_a_model_from_scratch_is_the_one_that_fake_makes(ranks: Any, kind: str, stage: int) -> None:
    ranks.run(from_scratch, kind, stage)


class Mute(nn.Module):
    """Nothing says how to fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def refuses_until_filled(stage: int) -> None:
    strategy = DeepspeedStrategy(zero_stage=stage, **SETTINGS)
    with strategy.init_model_context(meta_init=True):
        model = Mute()
    model = strategy.prepare(model)
    plan = UpdatePlan(version=1, specs=tuple(strategy.export_spec(model)))
    for use in (
        lambda: model(torch.ones(3)),
        lambda: next(strategy.export_weights(model, plan)),
        lambda: next(strategy.iter_state(model)),
    ):
        with pytest.raises(UnfilledModelError, match=r"scale: call strategy.import_weights"):
            use()
    strategy.import_weights(model, [("scale", torch.tensor([1.0, 2.0, 3.0]))])
    assert model(torch.ones(3)).tolist() == [1, 2, 3]


@on_each_stage
def test_a_model_that_nothing_fills_refuses_to_run(ranks: Any, stage: int) -> None:
    ranks.run(refuses_until_filled, stage)


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
