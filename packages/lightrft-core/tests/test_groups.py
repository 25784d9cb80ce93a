from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.strategy.errors import ConfigError
from lightrft.strategy.groups import RankLayout, blocks, strides

SIZES = st.integers(1, 96)


@st.composite
def layouts(draw: st.DrawFn) -> RankLayout:
    world_size = draw(SIZES)
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    return RankLayout(
        world_size=world_size,
        engine_tp_size=draw(st.sampled_from(divisors)),
        sp_size=draw(st.sampled_from(divisors)),
    )


def test_the_documents_example_of_eight_ranks_and_tensor_parallel_four() -> None:
    layout = RankLayout(world_size=8, engine_tp_size=4)
    assert layout.engine_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert [layout.engine_leader(rank) for rank in range(8)] == [0, 0, 0, 0, 4, 4, 4, 4]


@given(layouts())
def test_every_rank_is_in_exactly_one_group_of_each_kind(layout: RankLayout) -> None:
    everyone = list(range(layout.world_size))
    for groups in (layout.engine_groups, layout.sequence_groups, layout.data_groups, layout.shard_groups(8)):
        assert sorted(rank for group in groups for rank in group) == everyone
        assert len({len(group) for group in groups}) == 1


@given(layouts())
def test_a_rank_sends_its_prompts_to_the_first_of_its_engines_ranks(layout: RankLayout) -> None:
    for rank in range(layout.world_size):
        group = layout.engine_group(rank)
        assert rank in group
        assert layout.engine_leader(rank) == min(group)
        assert group == tuple(range(group[0], group[0] + layout.engine_tp_size)), "neighbours"


@given(layouts())
def test_data_groups_hold_one_rank_of_each_sequence_group(layout: RankLayout) -> None:
    for data_group in layout.data_groups:
        assert len(data_group) == layout.data_parallel_size
        for sequence_group in layout.sequence_groups:
            assert len(set(data_group) & set(sequence_group)) == 1


@given(layouts())
def test_ranks_of_one_sequence_see_the_same_data(layout: RankLayout) -> None:
    for group in layout.sequence_groups:
        assert len({layout.data_parallel_rank(rank) for rank in group}) == 1
    assert {layout.data_parallel_rank(rank) for rank in range(layout.world_size)} == set(
        range(layout.data_parallel_size)
    )


@given(SIZES, st.one_of(st.none(), st.integers(-2, 200)))
def test_a_shard_is_as_wide_as_wished_or_as_the_world_allows(world_size: int, wanted: int | None) -> None:
    size = RankLayout(world_size=world_size).shard_size(wanted)
    assert world_size % size == 0
    if wanted is None or wanted >= world_size:
        assert size == world_size
    else:
        assert size <= max(wanted, 1)
        assert not any(world_size % other == 0 for other in range(size + 1, wanted + 1)), "the largest that fits"


def test_fewer_ranks_than_shards_are_no_error() -> None:
    assert RankLayout(world_size=2).shard_groups(8) == ((0, 1),)
    assert RankLayout(world_size=6).shard_groups(4) == ((0, 1, 2), (3, 4, 5))
    assert RankLayout(world_size=16).shard_groups(8) == (tuple(range(8)), tuple(range(8, 16)))


@given(SIZES, st.integers(-1, 100), st.integers(-1, 100))
def test_sizes_that_do_not_divide_are_refused_together(world_size: int, tp: int, sp: int) -> None:
    wrong = [name for name, size in (("engine_tp_size", tp), ("sp_size", sp)) if size < 1 or world_size % size]
    if not wrong:
        RankLayout(world_size=world_size, engine_tp_size=tp, sp_size=sp)
        return
    with pytest.raises(ConfigError) as error:
        RankLayout(world_size=world_size, engine_tp_size=tp, sp_size=sp)
    assert len(error.value.problems) == len(wrong)
    assert all(f"--{name}" in problem for name, problem in zip(wrong, error.value.problems, strict=True))
    assert all(f"world size {world_size}" in problem for problem in error.value.problems)


def test_blocks_are_neighbours_and_strides_are_not() -> None:
    assert blocks(4, 2) == ((0, 1), (2, 3))
    assert strides(4, 2) == ((0, 2), (1, 3))
