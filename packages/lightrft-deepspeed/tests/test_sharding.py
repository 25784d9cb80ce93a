"""A stage-3 model that was prepared before it had an optimizer trains as one that had it at once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar
from unittest import mock

import pytest

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.testing.strategy_claims.claims import StrategyClaims, on_ranks


class TestSharding(StrategyClaims):
    world_size: ClassVar[int] = 2

    @classmethod
    def make_strategy(cls, **settings: Any) -> DeepspeedStrategy:
        return DeepspeedStrategy(zero_stage=3, **settings)

    @pytest.mark.parametrize("optimizer_first", [False, True])
    @on_ranks
    def test_the_engine_that_trains_gathers_for_forward_and_backward(self, optimizer_first: bool) -> None:
        strategy = self.strategy()
        model: Any = self.model()
        if optimizer_first:
            optimizer = strategy.create_optimizer(model)
            model, optimizer, _ = strategy.prepare((model, optimizer, None))
        else:
            model = strategy.prepare(model)
            optimizer = strategy.create_optimizer(model)
        coordinator = model.engine.optimizer.parameter_offload.get_param_coordinator()
        with mock.patch.object(coordinator, "fetch_sub_module", wraps=coordinator.fetch_sub_module) as fetch:
            self.train(strategy, model, optimizer)
        assert {call.kwargs["forward"] for call in fetch.call_args_list} == {True, False}


SCRIPT = """
import torch.distributed as dist
from lightrft.deepspeed import DeepspeedStrategy
from lightrft.testing.tiny_models import tiny_model

def main():
    strategy = DeepspeedStrategy(zero_stage=3, micro_train_batch_size=1, train_batch_size=1)
    model = strategy.prepare(tiny_model("qwen2"))
    dist.destroy_process_group()

main()
"""


@pytest.mark.full
def test_a_model_may_outlive_the_process_group() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr
