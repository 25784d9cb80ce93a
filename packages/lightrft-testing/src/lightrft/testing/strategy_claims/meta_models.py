"""Models built on the meta device: filled from files, by initialisation, or not at all, which is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightrft.strategy.meta_init import UnfilledModelError
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing.tiny_models import save_tiny_model, tiny_config, tiny_model

from .claims import StrategyClaims, on_ranks, weights_of

KINDS = ("qwen2_tied", "qwen3_moe")


class MetaModelClaims(StrategyClaims):
    """init_model_context(meta_init=True), and import_weights into what it made."""

    @pytest.mark.parametrize("kind", KINDS)
    @on_ranks
    def test_a_meta_model_is_read_from_the_folder_that_its_configuration_names(self, kind: str) -> None:
        strategy = self.strategy()
        model = strategy.prepare(_build(strategy, self._saved(strategy, kind)))
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        rows = self.rows(2)
        with torch.no_grad():
            found = model(input_ids=rows.to(strategy.device)).logits.cpu()
            expected = tiny_model(kind)(input_ids=rows).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    @on_ranks
    def test_a_meta_model_from_scratch_is_the_one_that_fake_makes(self, kind: str) -> None:
        strategy, fake = self.strategy(), self.reference()
        torch.manual_seed(strategy.rank)  # whatever was drawn before must not matter
        found = weights_of(strategy, strategy.prepare(_build(strategy, tiny_config(kind))))
        expected = weights_of(fake, fake.prepare(_build(fake, tiny_config(kind))))
        self.assert_same_weights(found, expected, exact=True)

    @on_ranks
    def test_a_meta_model_that_nothing_fills_refuses_to_run(self) -> None:
        strategy = self.strategy()
        with strategy.init_model_context(meta_init=True):
            model = Mute()
        model = strategy.prepare(model)
        plan = UpdatePlan(version=1, specs=tuple(strategy.export_spec(model)))
        row = torch.ones(3, device=strategy.device)
        for use in (
            lambda: model(row),
            lambda: next(strategy.export_weights(model, plan)),
            lambda: next(strategy.iter_state(model)),
            lambda: strategy.save_ckpt(model, self.folder),
        ):
            with pytest.raises(UnfilledModelError, match=r"scale: call strategy.import_weights"):
                use()
        strategy.import_weights(model, [("scale", torch.tensor([1.0, 2.0, 3.0]))])
        assert model(row).tolist() == [1, 2, 3]

    @on_ranks
    def test_a_meta_model_that_a_checkpoint_fills_runs(self) -> None:
        strategy = self.strategy()
        strategy.save_ckpt(strategy.prepare(Mute()), self.folder)
        with strategy.init_model_context(meta_init=True):
            model = Mute()
        model = strategy.prepare(model)
        strategy.load_ckpt(model, self.folder)
        assert model(torch.ones(3, device=strategy.device)).tolist() == [1, 1, 1]

    @on_ranks
    def test_an_optimizer_made_on_a_meta_model_trains_the_filled_one(self) -> None:
        strategy = self.strategy()
        model = _build(strategy, self._saved(strategy, "qwen2_tied"))
        optimizer = strategy.create_optimizer(model, lr=1e-2)
        model, _, _ = strategy.prepare((model, optimizer, None))
        before = weights_of(strategy, model)
        assert self.train(strategy, model, optimizer)[0].stepped
        after = weights_of(strategy, model)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        inner: Any = strategy.unwrap_model(model)
        assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight, "tied embeddings stay tied"

    def _saved(self, strategy: StrategyBase, kind: str) -> Any:
        """The configuration of a tiny model in a folder that all ranks read."""
        from transformers import AutoConfig

        strategy.setup_distributed()
        if strategy.is_rank_0():
            save_tiny_model(kind, self.folder / kind)
        strategy.all_gather_object("written")
        return AutoConfig.from_pretrained(self.folder / kind)


class Mute(nn.Module):
    """Nothing says how to fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``x`` ``[3]``."""
        return x * self.scale


def _build(strategy: StrategyBase, config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with strategy.init_model_context(meta_init=True):
        model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model.eval()
