from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.registry import register_engine
from lightrft.testing.fake_engine import FakeEngine


def test_an_engine_is_told_what_the_settings_say(tmp_path: Path) -> None:
    register_engine("told", FakeEngine)
    strategy = FakeStrategy(
        pretrain=str(tmp_path),
        bf16=True,
        seed=5,
        engine_mem_util=0.3,
        engine_timeout=7.0,
        prompt_max_len=8,
        max_model_len=77,
        weight_bucket_mb=3.0,
        trust_remote_code=True,
    )
    engine = strategy.setup_inference_engine(None, engine_type="told")
    spec = engine.spec
    assert (spec.pretrain, spec.dtype, spec.seed) == (str(tmp_path), torch.bfloat16, 5)
    assert (spec.memory_utilization, spec.call_timeout, spec.max_model_len) == (0.3, 7.0, 77)
    assert (spec.trust_remote_code, spec.tensor_parallel_size) == (True, 1)
    with mock.patch.object(engine, "begin_update", wraps=engine.begin_update) as begin:
        strategy.update_engine_weights(torch.nn.Linear(2, 1))
    assert begin.call_args.kwargs == {"bucket_bytes": 3 * 2**20}
