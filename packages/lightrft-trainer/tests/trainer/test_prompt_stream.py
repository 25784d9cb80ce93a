from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.trainer.prompt_stream import PromptStream


def stream(episodes: int = 2, **options: object) -> PromptStream:
    loader = FakeStrategy(seed=1).setup_dataloader(list(range(10)), 3, collate_fn=list, **options)
    return PromptStream(loader, episodes=episodes, batch_size=3)


def drain(source: PromptStream) -> list[list[int]]:
    batches = []
    while (batch := source.draw()) is not None:
        batches.append(batch)
    return batches


def test_every_episode_draws_all_batches_in_another_order() -> None:
    """The existing trainer checks for another sampler class than the loader uses, so that set_epoch never runs."""
    batches = drain(stream())
    assert len(batches) == 6
    first, second = (sorted(itertools.chain(*batches[i : i + 3])) for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 9
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize("done", range(7))
def test_a_position_is_found_again(done: int) -> None:
    """The existing trainer restores consumed_samples and then discards it."""
    whole = drain(stream())
    source = stream()
    for _ in range(done):
        source.draw()
    state = source.state_dict()
    again = stream()
    again.load_state_dict(state)
    assert drain(again) == whole[done:]


def test_a_loader_without_our_sampler_is_skipped_through() -> None:
    class Plain:
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[1], [2], [3]])

        def __len__(self) -> int:
            return 3

    source = PromptStream(Plain(), episodes=2, batch_size=1)
    source.load_state_dict({"episode": 1, "consumed_samples": 2})
    assert drain(source) == [[3]]


def test_an_empty_loader_ends_the_run_at_once() -> None:
    assert drain(PromptStream([], episodes=5, batch_size=1)) == []
