from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightrft.testing import RankPool
from lightrft.testing.ranks import PRELOAD, PRELOAD_VLLM


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two ranks, which are born with vLLM where it is installed."""
    with RankPool(2, timeout=300.0, preload=(*PRELOAD, *PRELOAD_VLLM)) as pool:
        yield pool
