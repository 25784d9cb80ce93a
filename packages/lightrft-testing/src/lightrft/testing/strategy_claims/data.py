"""The data loader: every sample once over all ranks, in an order that resumes exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .claims import StrategyClaims, on_ranks, refused


class DataClaims(StrategyClaims):
    """setup_dataloader."""

    @on_ranks
    def test_ranks_share_a_shuffled_dataset_without_overlap(self) -> None:
        strategy = self.strategy()
        loader = strategy.setup_dataloader(list(range(12 * self.world_size)), 3)
        mine = [value for batch in loader for value in batch.tolist()]
        everyone = [value for part in strategy.all_gather_object(mine) for value in part]
        assert len(mine) == 12
        assert sorted(everyone) == list(range(12 * self.world_size))
        assert everyone != sorted(everyone)

    @on_ranks
    def test_without_shuffling_the_order_is_the_datasets(self) -> None:
        strategy = self.strategy()
        loader = strategy.setup_dataloader(list(range(4 * self.world_size)), 2, shuffle=False)
        batches = [batch.tolist() for batch in loader]
        for index, parts in enumerate(zip(*strategy.all_gather_object(batches), strict=True)):
            size = 2 * self.world_size
            assert sorted(value for part in parts for value in part) == list(range(index * size, (index + 1) * size))

    @on_ranks
    def test_every_epoch_has_its_own_order_which_set_epoch_chooses(self) -> None:
        strategy = self.strategy()
        loader = strategy.setup_dataloader(list(range(16 * self.world_size)), 4)
        first, second = _epoch(loader), _epoch(loader)
        assert first != second
        loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
        assert _epoch(loader) == first
        loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
        assert _epoch(loader) == second

    @pytest.mark.parametrize("stop", [0, 1, 3])
    @on_ranks
    def test_a_saved_position_resumes_exactly(self, stop: int) -> None:
        def make() -> Any:
            return self.strategy().setup_dataloader(list(range(8 * self.world_size)), 2)

        whole = make()
        expected = [*_epoch(whole), *_epoch(whole)]
        loader = make()
        seen: list[list[int]] = []
        state = loader.state_dict()
        for batch in loader:
            if len(seen) == stop:
                break
            seen.append(batch.tolist())
            state = loader.state_dict()
        resumed = make()
        resumed.load_state_dict(state)
        rest = [*_epoch(resumed), *_epoch(resumed)]
        assert seen + rest == expected

    @on_ranks
    def test_consumed_samples_are_skipped(self) -> None:
        strategy = self.strategy()
        data = list(range(8 * self.world_size))
        whole = _epoch(strategy.setup_dataloader(data, 2))
        rest = _epoch(strategy.setup_dataloader(data, 2, consumed_samples=4 * self.world_size))
        assert rest == whole[2:]

    @pytest.mark.parametrize("drop_last", [True, False])
    @on_ranks
    def test_every_rank_sees_as_many_batches(self, drop_last: bool) -> None:
        strategy = self.strategy()
        loader = strategy.setup_dataloader(list(range(4 * self.world_size + 1)), 2, drop_last=drop_last)
        lengths = strategy.all_gather_object([len(batch) for batch in _epoch(loader)])
        assert lengths == [lengths[0]] * self.world_size
        assert sum(lengths[0]) == (4 if drop_last or self.world_size == 1 else 5) + (
            1 if self.world_size == 1 and not drop_last else 0
        )

    @on_ranks
    def test_batches_are_collated_by_the_callers_function(self) -> None:
        loader = self.strategy().setup_dataloader(
            [{"x": value} for value in range(4 * self.world_size)], 2, collate_fn=_collate, drop_last=True
        )
        for batch in loader:
            assert set(batch) == {"x"}
            assert isinstance(batch["x"], torch.Tensor)

    @on_ranks
    def test_a_callers_sampler_keeps_its_own_position(self) -> None:
        strategy = self.strategy()
        data = list(range(6))
        sampler = torch.utils.data.SequentialSampler(data)
        assert _epoch(strategy.setup_dataloader(data, 3, sampler=sampler)) == [[0, 1, 2], [3, 4, 5]]
        with refused(ValueError, saying=["consumed_samples"]):
            strategy.setup_dataloader(data, 3, sampler=sampler, consumed_samples=3)


def _epoch(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def _collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([item["x"] for item in items])}
