"""Each option changes how DeepSpeed computes, and none changes what."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.deepspeed.adam import lacking_for_cpu_adam
from lightrft.testing.strategy_claims.claims import (
    StrategyClaims,
    gradients_of,
    on_ranks,
    weights_of,
)

MISSING = lacking_for_cpu_adam()
FULL = pytest.mark.full
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


class TestOptions(StrategyClaims):
    world_size: ClassVar[int] = 2

    @classmethod
    def make_strategy(cls, **settings: Any) -> DeepspeedStrategy:
        return DeepspeedStrategy(**settings)

    @contextlib.contextmanager
    def sixteen_bit(self) -> Iterator[None]:
        """DeepSpeed asks a CPU for fast fp16; torch computes it without."""
        from deepspeed.accelerator import get_accelerator

        kind = type(get_accelerator())
        offered, kind.is_fp16_supported = kind.is_fp16_supported, lambda self: True
        try:
            yield
        finally:
            kind.is_fp16_supported = offered

    def outcome(self, accumulation: int = 2, **settings: Any) -> Any:
        """Gradients of a first step, the weights after three, and the last norm; clipped."""
        strategy = self.strategy(accumulation=accumulation, max_norm=0.5, **settings)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        [first] = self.train(strategy, model, optimizer, accumulation=accumulation)
        gradients = gradients_of(strategy, model, optimizer)
        [*_, last] = self.train(strategy, model, optimizer, steps=2, first=1, accumulation=accumulation)
        return gradients, weights_of(strategy, model), (first.grad_norm, last.grad_norm)

    def expected(self, accumulation: int = 2) -> Any:
        reference = self.reference(accumulation=accumulation, max_norm=0.5)
        model = reference.prepare(self.model())
        optimizer = reference.create_optimizer(model)
        [first] = self.train(reference, model, optimizer)
        gradients = gradients_of(reference, model, optimizer)
        [*_, last] = self.train(reference, model, optimizer, steps=2, first=1)
        return gradients, weights_of(reference, model), (first.grad_norm, last.grad_norm)

    def assert_as_expected(self, outcome: Any) -> None:
        (gradients, weights, norms), expected = outcome, self.expected()
        self.assert_same_gradients(gradients, expected[0])
        self.assert_same_weights(weights, expected[1])
        assert norms == pytest.approx(expected[2], rel=1e-5)

    @STAGES
    @on_ranks
    def test_overlapped_reduction_leaves_the_numbers(self, stage: int) -> None:
        self.assert_as_expected(self.outcome(zero_stage=stage, overlap_comm=True))

    @STAGES
    @on_ranks
    def test_adam_on_the_host_needs_no_compiler(self, stage: int) -> None:
        lines = io.StringIO()
        handler = logging.StreamHandler(lines)
        logging.getLogger("lightrft").addHandler(handler)
        try:
            with mock.patch.dict(os.environ, PATH=""):
                strategy = self.strategy(zero_stage=stage, adam_offload=True)
                optimizer = strategy.create_optimizer(self.model())
                outcome = self.outcome(zero_stage=stage, adam_offload=True)
        finally:
            logging.getLogger("lightrft").removeHandler(handler)
        assert type(optimizer) is torch.optim.AdamW
        if strategy.is_rank_0():
            assert "DeepSpeedCPUAdam needs a C++ compiler (c++); torch's AdamW steps on the host" in lines.getvalue()
        self.assert_as_expected(outcome)

    @pytest.mark.full  # the first run compiles for a minute or two
    @pytest.mark.skipif(MISSING is not None, reason=f"DeepSpeedCPUAdam is compiled at its first use: install {MISSING}")
    @STAGES
    @on_ranks
    def test_deepspeeds_adam_on_the_host_leaves_the_numbers(self, stage: int) -> None:
        strategy = self.strategy(zero_stage=stage, adam_offload=True)
        optimizer = strategy.create_optimizer(self.model())
        assert type(optimizer).__name__ == "DeepSpeedCPUAdam"
        self.assert_as_expected(self.outcome(zero_stage=stage, adam_offload=True))
        model, other = strategy.prepare(self.model()), strategy.prepare(self.model())
        optimizer, later = strategy.create_optimizer(model), strategy.create_optimizer(other)
        self.train(strategy, model, optimizer)
        strategy.load_state(other, later, strategy.iter_state(model, optimizer))
        self.train(strategy, model, optimizer, first=1)
        self.train(strategy, other, later, first=1)
        self.assert_same_weights(weights_of(strategy, other), weights_of(strategy, model), exact=True)

    @on_ranks
    def test_a_secondary_shard_leaves_the_numbers(self) -> None:
        self.assert_as_expected(self.outcome(zero_stage=3, zpg=2))

    @on_ranks
    def test_a_secondary_shard_follows_weights_that_are_read(self) -> None:
        strategy = self.strategy(zero_stage=3, zpg=2)
        source, plain = strategy.prepare(self.model(seed=5)), self.model(seed=5)
        frozen = strategy.prepare_model(self.model(), shard_size=1)
        rows = self.rows(2)
        for _ in range(2):
            logits = frozen(input_ids=rows).logits
            strategy.load_state(frozen, None, strategy.iter_state(source))
        with torch.no_grad():
            logits, expected = frozen(input_ids=rows).logits, plain(input_ids=rows).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    @STAGES
    @pytest.mark.parametrize(
        "settings",
        [
            pytest.param({"bf16": True}, id="bf16"),
            pytest.param({"fp16": True}, id="fp16"),
            pytest.param({"bf16": True, "grad_accum_dtype": "bf16"}, id="bf16, bf16 gradients", marks=FULL),
            pytest.param({"fp16": True, "grad_accum_dtype": "fp16"}, id="fp16, fp16 gradients", marks=FULL),
            pytest.param({"bf16": True, "adam_offload": True}, id="bf16, Adam on the host", marks=FULL),
            pytest.param(
                {"bf16": True, "grad_accum_dtype": "bf16", "overlap_comm": True}, id="bf16, overlapped", marks=FULL
            ),
        ],
    )
    @on_ranks
    def test_sixteen_bit_runs_stay_within_their_rounding(self, settings: dict[str, Any], stage: int) -> None:
        with self.sixteen_bit():
            gradients, _, norms = self.outcome(zero_stage=stage, **settings)
        expected = self.expected()
        scale = math.sqrt(sum(tensor.square().sum().item() for tensor in expected[0].values()))
        error = math.sqrt(sum((gradients[k] - v).square().sum().item() for k, v in expected[0].items())) / scale
        assert error < 10 * 2**-8, "ten times the rounding of one bf16 number"
        assert norms == pytest.approx(expected[2], rel=0.02)

    @STAGES
    @on_ranks
    def test_an_fp16_overflow_skips_the_step_halves_the_scale_and_is_counted(self, stage: int) -> None:
        with self.sixteen_bit():
            strategy = self.strategy(zero_stage=stage, fp16=True)
            model = strategy.prepare(self.model())
            optimizer = strategy.create_optimizer(model)
            self.train(strategy, model, optimizer)
            before, record = weights_of(strategy, model), strategy.record(model)
            record.loss_scale.value = 2.0**40
            [result] = self.train(strategy, model, optimizer, first=1)
            assert result.skipped
            assert result.grad_norm is not None
            assert not math.isfinite(result.grad_norm)
            assert (record.skipped_steps, record.loss_scale.value) == (1, 2.0**39)
            self.assert_same_weights(weights_of(strategy, model), before, exact=True)
            strategy.save_ckpt(model, self.folder)
            record.loss_scale.value = 2.0**10
            [result] = self.train(strategy, model, optimizer, first=1)
            assert result.stepped
            assert result.grad_norm == pytest.approx(self.expected_norm(before), rel=0.02)
            strategy.load_ckpt(model, self.folder)
            assert (record.skipped_steps, record.loss_scale.value) == (1, 2.0**39)

    def expected_norm(self, weights: Mapping[str, torch.Tensor]) -> float:
        """The norm of the second batch's gradient, at these weights, in fp32."""
        reference = self.reference()
        model = self.model()
        model.load_state_dict(dict(weights), strict=False)
        model = reference.prepare(model)
        [result] = self.train(reference, model, reference.create_optimizer(model), first=1)
        assert result.grad_norm is not None
        return result.grad_norm
