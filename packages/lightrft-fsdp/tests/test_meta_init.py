"""Models built without memory, beyond the suite: new heads, plain modules, files that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.fsdp import FSDPV2Strategy, UnfilledModelError
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
