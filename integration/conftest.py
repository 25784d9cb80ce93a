from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightrft.testing import RankPool
from lightrft.testing.ranks import PRELOAD

VLLM = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two ranks, which are born with vLLM where it is installed."""
    with RankPool(2, timeout=300.0, preload=(*PRELOAD, *VLLM)) as pool:
        yield pool
