"""Fixtures that pytest offers if lightrft-testing is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .ranks import RankPool

pytest.register_assert_rewrite("lightrft.testing.engine_claims", "lightrft.testing.strategy_claims")


def pytest_configure(config: pytest.Config) -> None:
    """The suites' mark: ``-m "not full"`` skips the long tests."""
    config.addinivalue_line("markers", "full: a long campaign")


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[Callable[[int], RankPool]]:
    """``rank_pools(n)``: the pool of ``n`` ranks, started on first use and shared by the whole session."""
    from .ranks import RankPool  # importing torch takes seconds, and many test runs need no ranks

    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def ranks(rank_pools: Callable[[int], RankPool]) -> RankPool:
    """A pool of two ranks."""
    return rank_pools(2)
