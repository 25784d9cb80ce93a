"""Models built without memory: filled from files, by initialisation, or not at all, and then they say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.fsdp import FSDPV2Strategy, UnfilledModelError
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import save_tiny_model, tiny_model
from lightrft.testing.tiny_models import tiny_config

SETTINGS = {"seed": 3, "dist_timeout": 60.0, "micro_train_batch_size": 1, "train_batch_size": 2}
ROWS = torch.arange(7, 15)[None]


def build(strategy: FSDPV2Strategy, config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with strategy.init_model_context(meta_init=True):
        model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS).logits.float()


def from_a_folder(folder: str, kind: str) -> torch.Tensor:
    from transformers import AutoConfig

    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(build(strategy, AutoConfig.from_pretrained(folder)))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return logits(model)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
def test_a_configuration_that_names_a_folder_is_read_from_there(
    rank_pools: Any, tmp_path: Path, kind: str, world_size: int
) -> None:
    folder = save_tiny_model(kind, tmp_path / "model")
    expected = logits(tiny_model(kind))
    for found in rank_pools(world_size).run(from_a_folder, folder, kind):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Critic(nn.Module):
    """A pretrained model with a head that no file holds."""

    is_critic = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(64, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(input_ids=input_ids, output_hidden_states=True).hidden_states[-1])


def with_a_new_head(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    strategy = FSDPV2Strategy(**SETTINGS)
    with strategy.init_model_context(meta_init=True):
        model = Critic(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
    model = strategy.prepare(model)
    items = {item.name: item.weight for item in strategy.iter_state(model)}
    return items["head.weight"], items["model.model.embed_tokens.weight"]


def test_what_the_files_lack_is_initialised_alike_on_every_number_of_ranks(rank_pools: Any, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "model")
    found = [*rank_pools(1).run(with_a_new_head, folder), *rank_pools(2).run(with_a_new_head, folder)]
    expected = tiny_model("qwen2").model.embed_tokens.weight
    for head, embedding in found:
        assert head.isfinite().all()
        assert head.std() > 0
        assert torch.equal(head, found[0][0])
        assert torch.equal(embedding, expected)


def from_scratch(kind: str) -> dict[str, torch.Tensor]:
    strategy = FSDPV2Strategy(**SETTINGS)
    torch.manual_seed(strategy.rank)  # whatever was drawn before must not matter
    model = strategy.prepare(build(strategy, tiny_config(kind)))
    assert logits(model).isfinite().all()
    return {item.name: item.weight for item in strategy.iter_state(model)}


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
def test_a_model_from_scratch_is_the_same_on_every_number_of_ranks(rank_pools: Any, kind: str) -> None:
    results = [*rank_pools(1).run(from_scratch, kind), *rank_pools(2).run(from_scratch, kind)]
    for weights in results:
        for name, value in weights.items():
            assert torch.equal(value, results[0][name]), name
    matrices = [value for value in results[0].values() if value.ndim >= 2]
    for value in matrices:
        assert abs(value.std().item() - tiny_config(kind).initializer_range) < 0.02


def plain_modules_reset() -> float:
    strategy = FSDPV2Strategy(**SETTINGS)
    with strategy.init_model_context(meta_init=True):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = strategy.prepare(model)
    assert model[2].running_var.eq(1).all()  # type: ignore[union-attr, operator]
    return model(torch.ones(3, 4)).sum().item()


def test_modules_that_can_reset_themselves_do(ranks: Any) -> None:
    first, second = ranks.run(plain_modules_reset)
    assert first == second


class Mute(nn.Module):
    """Nothing says how to fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def refuses_until_filled() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_that_nothing_fills_refuses_to_run(rank_pools: Any, world_size: int) -> None:
    rank_pools(world_size).run(refuses_until_filled)


def names_a_model_that_is_not_here(folder: str) -> torch.Tensor:
    strategy = FSDPV2Strategy(**SETTINGS)
    config = tiny_config("qwen2")
    config._name_or_path = "nobody/has-this-model"
    model = strategy.prepare(build(strategy, config))
    with pytest.raises(UnfilledModelError, match="name_or_path"):
        logits(model)
    filled = strategy.prepare(tiny_model("qwen2"))
    strategy.save_ckpt(filled, folder, tag="one")
    strategy.load_ckpt(model, folder, tag="one")
    return logits(model)


def test_a_missing_pretrained_model_is_not_replaced_by_a_random_one(ranks: Any, tmp_path: Path) -> None:
    for found in ranks.run(names_a_model_that_is_not_here, str(tmp_path)):
        torch.testing.assert_close(found, logits(tiny_model("qwen2")), atol=1e-5, rtol=1e-5)


def keeps_its_optimizer(folder: str) -> None:
    """An optimizer that was made while the model had no memory trains it."""
    from transformers import AutoConfig

    strategy = FSDPV2Strategy(**SETTINGS)
    model = build(strategy, AutoConfig.from_pretrained(folder))
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    model, _, _ = strategy.prepare((model, optimizer, None))
    before = [item.weight for item in strategy.iter_state(model)]
    strategy.backward(model(input_ids=ROWS, labels=ROWS).loss, model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped
    after = [item.weight for item in strategy.iter_state(model)]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    assert embedding.weight is head.weight, "tied embeddings stay tied"


def test_an_optimizer_made_on_the_meta_model_trains_the_filled_one(ranks: Any, tmp_path: Path) -> None:
    ranks.run(keeps_its_optimizer, save_tiny_model("qwen2_tied", tmp_path / "model"))
