"""How many bytes a rank receives while prompts are gathered: its group's prompts, whatever the size of the world."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed import distributed_c10d

from lightrft.strategy.engine import EngineCapabilities
from lightrft.strategy.native_strategy import NativeStrategy
from lightrft.strategy.registry import register_engine
from lightrft.testing.fake_engine import FakeEngine
from lightrft.testing.ranks import RankPool

GROUP = 2
PROMPTS, LENGTH = 8, 256
PLACEMENTS = ("spmd", "leader")


class Joined(NativeStrategy):
    """A strategy of several ranks that trains nothing."""

    name = "joined"


class Split(FakeEngine):
    """An engine over the ranks of a group."""

    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        devices=("cpu",), needs_model=False, tensor_parallel=True
    )


class Owned(Split):
    """The same, owned by the first rank of its group alone."""

    placement = "leader"


@contextmanager
def counted(received: dict[str, int]) -> Iterator[None]:
    """Count the bytes that torch's object collectives bring to this rank, by the collective under them."""
    originals = {name: getattr(distributed_c10d, name) for name in ("all_gather", "broadcast", "gather", "scatter")}

    def counting(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            done = act(*args, **kwargs)
            brought = kwargs.get("gather_list") if name == "gather" else args[0]
            tensors = [brought] if isinstance(brought, torch.Tensor) else brought or []
            received[name] = received.get(name, 0) + sum(tensor.nbytes for tensor in tensors)
            return done

        return call

    for name, act in originals.items():
        setattr(distributed_c10d, name, counting(name, act))
    try:
        yield
    finally:
        for name, act in originals.items():
            setattr(distributed_c10d, name, act)


def traffic(placement: str, prompts: int) -> tuple[int, int]:
    """Bytes that this rank receives in a ``gather_and_generate`` of so many prompts a rank: prompts and outputs of its
    group, and words about them from everybody.
    """
    register_engine("counted", Owned if placement == "leader" else Split)
    strategy = Joined(train_batch_size=int(os.environ["WORLD_SIZE"]), engine_tp_size=GROUP)
    strategy.setup_inference_engine(None, "counted")
    source = random.Random(strategy.rank)
    mine = [[source.randrange(3, 60) for _ in range(LENGTH)] for _ in range(prompts)]
    received: dict[str, int] = {}
    with counted(received):
        outputs = strategy.gather_and_generate({"max_tokens": 1}, all_prompt_token_ids=mine)
    assert [list(output.prompt_token_ids) for output in outputs] == mine
    strategy.engine_host.shutdown()
    words = received.pop("all_gather")
    return sum(received.values()), words


@pytest.mark.parametrize("worlds", [(2, 4), pytest.param((2, 4, 8), marks=pytest.mark.full)], ids=str)
def test_a_rank_receives_its_groups_prompts_and_no_others(worlds: tuple[int, ...]) -> None:
    """``-rP`` prints the bytes: of prompts and outputs, and of words from everybody."""
    bytes_of_prompts: dict[tuple[str, int], list[int]] = {}
    for world in worlds:
        with RankPool(world, timeout=60.0) as ranks:
            for placement in PLACEMENTS:
                for prompts in (PROMPTS, 2 * PROMPTS) if world == worlds[0] else (PROMPTS,):
                    found = ranks.run(traffic, placement, prompts)
                    sys.stdout.write(f"{placement}, {world} ranks, {prompts} prompts each: {max(found)}\n")
                    bytes_of_prompts.setdefault((placement, prompts), []).append(max(nbytes for nbytes, _ in found))
                    # A few numbers from each rank, as pickle writes them, are all that grows with the world.
                    assert max(words for _, words in found) <= 64 * world
    for placement in PLACEMENTS:
        few, (many,) = (bytes_of_prompts[placement, prompts] for prompts in (PROMPTS, 2 * PROMPTS))
        assert max(few) <= 1.01 * min(few), "the same in every world"
        assert many <= 2.01 * min(few), "twice the prompts, twice the bytes"
        # Gathered, then handed round or answered: each of the group's prompts no more than three times.
        assert max(few) <= 3 * GROUP * PROMPTS * 2 * LENGTH
