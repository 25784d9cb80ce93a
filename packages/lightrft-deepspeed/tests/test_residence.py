"""Moving tensors away and back, on a machine that may have one device: every move then makes a copy elsewhere.

What matters is the same on any device: flat buffers really move, their views follow, the bytes are right, and training
goes on bit for bit.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from lightrft.deepspeed import DeepspeedStrategy, residence
from lightrft.testing.strategy_claims.claims import StrategyClaims, moments_of, on_ranks, weights_of

HOST = torch.device("cpu")


class TestResidence(StrategyClaims):
    world_size: ClassVar[int] = 2

    @classmethod
    def make_strategy(cls, **settings: Any) -> DeepspeedStrategy:
        return DeepspeedStrategy(**settings)

    @pytest.mark.parametrize(
        ("stage", "bf16"),
        [
            *(pytest.param(stage, bf16, marks=pytest.mark.full) for stage, bf16 in ((1, False), (1, True), (2, False))),
            *((2, True), (3, False), (3, True)),
        ],
    )
    @on_ranks
    def test_training_goes_on_over_moved_buffers(self, stage: int, bf16: bool) -> None:
        results = []
        for moves in (False, True):
            strategy = self.strategy(zero_stage=stage, bf16=bf16)
            model = strategy.prepare(self.model())
            optimizer = strategy.create_optimizer(model)
            self.train(strategy, model, optimizer)
            if moves:
                self.move_everything(strategy, model)
            seen = weights_of(strategy, model), moments_of(strategy, model, optimizer)
            for step in (1, 2):
                self.train(strategy, model, optimizer, first=step)
                if moves:
                    self.move_everything(strategy, model)
            results.append((*seen, weights_of(strategy, model), moments_of(strategy, model, optimizer)))
        for moved, still in zip(results[1], results[0], strict=True):
            self.assert_same_weights(moved, still, exact=True)

    def move_everything(self, strategy: DeepspeedStrategy, model: torch.nn.Module) -> None:
        zero = strategy._zero(model)
        original = residence.is_elsewhere, residence.carry
        residence.is_elsewhere, residence.carry = (lambda *_: True), (lambda tensor, *_: tensor.clone())  # type: ignore[assignment]
        try:
            states = residence.move_optimizer_states(zero, HOST, pin=False)
            parameters = residence.move_parameters(model, zero, HOST, pin=False)
        finally:
            residence.is_elsewhere, residence.carry = original
        width = 2 if strategy.config.bf16 else 4
        whole = sum(item.weight.numel() for item in strategy.iter_state(model))
        ranks = strategy.all_reduce({"states": states, "parameters": parameters}, "sum")
        held = whole * width * (1 if strategy.config.zero_stage == 3 else self.world_size)
        # Partitions are padded so that they divide.
        assert ranks["states"] == pytest.approx(3 * 4 * whole, rel=0.01), "two moments and the master weights, in fp32"
        assert ranks["parameters"] == pytest.approx(held, rel=0.01)

    @on_ranks
    def test_what_deepspeed_keeps_on_the_host_is_said_in_a_sentence(self) -> None:
        strategy = self.strategy(adam_offload=True)
        with mock.patch.dict(os.environ, PATH=""):  # nothing is compiled for a sentence
            model = strategy.prepare(self.model())
            optimizer = strategy.create_optimizer(model)
        with mock.patch.object(strategy, "move") as move:
            self.train(strategy, model, optimizer)
        move.assert_not_called()  # at each step it would say the sentence again
        for report in (strategy.maybe_offload_optimizer(optimizer), strategy.maybe_load_optimizer(optimizer)):
            assert report.nbytes == 0
            assert "with --adam_offload these states are always on the host" in str(report)
