"""The engine suite on every rank of a launch, in step: for torchrun, ``vllm_in_step.py TP [pytest options]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.distributed as dist

from lightrft.engines.vllm import VLLMEngine
from lightrft.strategy.engine import EngineSpec, RolloutEngine
from lightrft.testing.engine_suite import EngineSuite
from lightrft.testing.tiny_models import save_tiny_model

TP_SIZE = "LIGHTRFT_TEST_TP_SIZE"
FOLDER = "LIGHTRFT_TEST_FOLDER"


class TestVLLMInStep(EngineSuite):
    spec_options: ClassVar[Mapping[str, Any]] = {
        "tensor_parallel_size": int(os.environ.get(TP_SIZE, "1")),
        "call_timeout": 60.0,
        "extra": {"kv_cache_memory_bytes": 16 * 2**20},
    }
    text_kinds = ("qwen2", "qwen2_tied")
    vision_kinds = ("qwen2_vl", "qwen2_5_vl")
    samples = 600

    @pytest.fixture
    def folders(self) -> Callable[[str], str]:
        return lambda kind: str(models() / kind)

    @pytest.fixture
    def make_engine(self) -> Any:
        def make(spec: EngineSpec) -> RolloutEngine:
            engine = VLLMEngine()
            engine.start(spec, None if spec.tensor_parallel_size == 1 else dist.group.WORLD)
            return engine

        return make


def models() -> Path:
    """Where this rank's models lie."""
    return Path(os.environ[FOLDER], f"models_{os.environ['RANK']}")


def main(size: str, *options: str) -> int:
    os.environ[TP_SIZE] = size
    # Once the ranks have joined, transformers lets only the first of them write.
    for kind in (*TestVLLMInStep.text_kinds, *TestVLLMInStep.vision_kinds):
        save_tiny_model(kind, models() / kind)
    dist.init_process_group("gloo")
    folder = Path(os.environ[FOLDER], os.environ["RANK"])
    root = Path(__file__).parents[3]
    code = pytest.main(
        ["-c", str(root / "pyproject.toml"), "-p", "no:cacheprovider", f"--basetemp={folder}", __file__, *options]
    )
    dist.barrier()  # the trainer's process group survived every engine's end
    dist.destroy_process_group()
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
