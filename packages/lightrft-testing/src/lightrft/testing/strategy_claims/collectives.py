"""Reducing and gathering: dtypes, shapes and structures are kept, arguments are not changed."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from .claims import StrategyClaims, on_ranks, refused


class CollectiveClaims(StrategyClaims):
    """all_reduce and all_gather."""

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8"])
    @on_ranks
    def test_all_reduce_keeps_dtype_and_shape_and_its_argument(self, dtype: str) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        kind = getattr(torch, dtype)
        mine = torch.full((2, 3), strategy.rank + 1, dtype=kind, device=strategy.device)
        before = mine.clone()
        ranks = range(1, self.world_size + 1)
        for op, value in (("sum", sum(ranks)), ("max", max(ranks)), ("min", min(ranks))):
            result = strategy.all_reduce(mine, op)
            assert result.dtype == kind
            assert torch.equal(result, torch.full_like(mine, value))
            assert result is not mine
        assert torch.equal(mine, before)

    @on_ranks
    def test_mean_is_the_default_and_a_mean_of_integers_is_no_integer(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        mean = sum(range(self.world_size)) / self.world_size
        assert strategy.all_reduce(strategy.rank) == mean
        result = strategy.all_reduce(torch.tensor([strategy.rank], device=strategy.device))
        assert result.dtype.is_floating_point
        assert result.tolist() == [mean]
        half = strategy.all_reduce(torch.tensor([strategy.rank], dtype=torch.bfloat16, device=strategy.device))
        assert half.dtype == torch.bfloat16

    @on_ranks
    def test_python_numbers_come_back_as_python_numbers(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        large = 2**53 + 1  # no float64 holds it
        total = strategy.all_reduce(large, "sum")
        assert type(total) is int
        assert total == large * self.world_size
        tenth = strategy.all_reduce(0.1, "max")
        assert type(tenth) is float
        assert tenth == 0.1  # not its neighbour in fp32
        assert strategy.all_reduce(strategy.rank == 0, "max") == 1
        half = strategy.all_reduce(numpy.float32(0.5), "mean")
        assert (type(half), half) == (float, 0.5)
        # A sum over nothing is an int; what is NaN on one rank is NaN.
        assert strategy.all_reduce(0 if strategy.rank else 0.5, "sum") == 0.5
        assert math.isnan(strategy.all_reduce(math.inf if strategy.rank else math.nan, "max"))

    @on_ranks
    def test_zero_dimensional_tensors_survive(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        mine = torch.tensor(float(strategy.rank), device=strategy.device)
        assert strategy.all_reduce(mine, "sum").shape == ()
        gathered = strategy.all_gather(mine)
        assert gathered.tolist() == [float(rank) for rank in range(self.world_size)]

    @on_ranks
    def test_dicts_recurse_and_keep_their_order(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        data = {"z": 1, "a": {"loss": torch.ones(2, device=strategy.device), "x": 0.5}, "m": 2.0}
        reduced = strategy.all_reduce(data, "sum")
        assert list(reduced) == ["z", "a", "m"]
        assert reduced["z"] == self.world_size
        assert reduced["a"]["loss"].tolist() == [self.world_size] * 2
        assert reduced["m"] == 2.0 * self.world_size
        assert data["z"] == 1
        gathered = strategy.all_gather({"rank": strategy.rank, "rows": torch.zeros(1, 2, device=strategy.device)})
        assert gathered["rank"] == list(range(self.world_size))
        assert gathered["rows"].shape == (self.world_size, 2)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
    @on_ranks
    def test_all_gather_joins_uneven_lengths_in_rank_order(self, dtype: str) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        kind = getattr(torch, dtype)
        mine = torch.full((strategy.rank, 3), strategy.rank, device=strategy.device).to(kind)  # rank 0 has no row
        result = strategy.all_gather(mine)
        assert result.dtype == kind
        expected = [torch.full((rank, 3), rank).to(kind) for rank in range(self.world_size)]
        assert torch.equal(result.cpu(), torch.cat(expected))

    @on_ranks
    def test_views_and_gradients_are_left_alone(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        whole = torch.arange(6.0, device=strategy.device).reshape(2, 3).requires_grad_()
        turned = whole.t()
        result = strategy.all_reduce(turned, "sum")
        assert torch.equal(result, turned.detach() * self.world_size)
        assert not result.requires_grad
        assert strategy.all_gather(turned).shape == (3 * self.world_size, 2)
        assert torch.equal(whole.detach().flatten().cpu(), torch.arange(6.0))

    @on_ranks
    def test_objects_are_gathered_in_rank_order(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        assert strategy.all_gather("ab"[strategy.rank % 2]) == ["ab"[rank % 2] for rank in range(self.world_size)]
        strategy.barrier()

    @on_ranks
    def test_an_unknown_operation_is_answered_with_the_known_ones(self) -> None:
        strategy = self.strategy()
        with refused(ValueError, saying=["median", "mean", "sum", "max", "min"]):
            strategy.all_reduce(1.0, "median")
        with refused(TypeError, saying=["str"]):
            strategy.all_reduce("text")
        if self.world_size > 1:
            with refused(ValueError, saying=["1 to 2 numbers: all ranks must pass equally many"]):
                strategy.all_reduce({"a": 1.0, "b": 2.0} if strategy.rank else {"a": 1.0}, "sum")
