from __future__ import annotations

import warnings
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.strategy.dataloader import ResumableSampler
from lightrft.strategy.fake_strategy import FakeStrategy


def sampler(count: int, rank: int, world_size: int, **options: Any) -> ResumableSampler:
    given = {"shuffle": True, "seed": 3, "drop_last": True, **options}
    return ResumableSampler(range(count), rank=rank, world_size=world_size, **given)


def epoch(count: int, world_size: int, **options: Any) -> list[list[int]]:
    return [list(sampler(count, rank, world_size, **options)) for rank in range(world_size)]


SIZES = {"count": st.integers(1, 60), "world_size": st.integers(1, 7)}


@given(**SIZES, drop_last=st.booleans())
def test_ranks_draw_alike_many_samples_and_each_at_most_once(count: int, world_size: int, drop_last: bool) -> None:
    parts = epoch(count, world_size, drop_last=drop_last)
    assert len({len(part) for part in parts}) == 1
    drawn = [index for part in parts for index in part]
    if drop_last:
        assert len(set(drawn)) == len(drawn)
        assert count - len(drawn) < world_size
    else:
        assert set(drawn) == set(range(count))
        assert len(drawn) - count < world_size


@given(**SIZES)
def test_a_global_batch_does_not_depend_on_how_many_ranks_share_it(count: int, world_size: int) -> None:
    alone = epoch(count, 1, drop_last=False)[0]
    together = [index for row in zip(*epoch(count, world_size), strict=True) for index in row]
    assert together == alone[: len(together)]


@given(**SIZES, data=st.data())
@settings(max_examples=60)
def test_a_saved_position_fits_another_world_size(count: int, world_size: int, data: st.DataObject) -> None:
    whole = [index for row in zip(*epoch(count, world_size), strict=True) for index in row]
    first = sampler(count, 0, world_size)
    taken = data.draw(st.integers(0, len(whole) // world_size))
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
    state = first.state_dict()
    resumed = sampler(count, 0, 1, drop_last=False)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert rest[: len(whole) - taken * world_size] == whole[taken * world_size :]


@given(count=st.integers(2, 60), world_size=st.integers(1, 4), epochs=st.integers(0, 3), drop_last=st.booleans())
def test_consumed_samples_count_over_epochs(count: int, world_size: int, epochs: int, drop_last: bool) -> None:
    per_epoch = (count // world_size if drop_last else -(-count // world_size)) * world_size
    if not per_epoch:
        return
    consumed = epochs * per_epoch + world_size
    skipped = sampler(count, 0, world_size, drop_last=drop_last, consumed_samples=consumed)
    followed = sampler(count, 0, world_size, drop_last=drop_last)
    followed.set_epoch(epochs, consumed_samples=world_size % per_epoch)
    if per_epoch == world_size:
        followed.set_epoch(epochs + 1)
    assert list(skipped) == list(followed)


def test_every_epoch_is_shuffled_anew_and_alike_for_a_seed() -> None:
    one = sampler(30, 0, 2)
    first, second = list(one), list(one)
    assert first != second
    assert one.epoch == 2
    again = sampler(30, 0, 2)
    assert [list(again), list(again)] == [first, second]
    assert list(sampler(30, 0, 2, seed=4)) != first


def test_the_length_is_what_is_left() -> None:
    one = sampler(30, 0, 2, consumed_samples=10)
    assert len(one) == 10
    assert len(list(one)) == 10


def test_fewer_samples_than_ranks_are_nothing_or_repeated() -> None:
    assert epoch(2, 4) == [[], [], [], []]
    assert all(len(part) == 1 for part in epoch(2, 4, drop_last=False))


def test_a_loader_brings_no_warnings_of_its_library() -> None:
    strategy = FakeStrategy()
    with warnings.catch_warnings(action="error"):
        assert list(strategy.setup_dataloader(range(4), 2, shuffle=False, collate_fn=list)) == [[0, 1], [2, 3]]


def test_a_new_start_of_an_epoch_leaves_the_random_state() -> None:
    """A resumed run starts its epoch again, after the random state has come back."""
    loader = FakeStrategy().setup_dataloader(range(4), 2, collate_fn=list)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)
