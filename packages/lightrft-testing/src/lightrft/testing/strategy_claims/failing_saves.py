"""Saves and loads that fail: every rank raises, the earlier checkpoint stays intact, nothing incomplete is left."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any

import pytest

from lightrft.strategy.checkpoint_folders import whole_checkpoints
from lightrft.strategy.disk import folder_size
from lightrft.strategy.errors import CheckpointError, RankTimeoutError
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.testing.faults import calling_first, limited_file_size, refusing_files, small_disk
from lightrft.testing.ranks import FunctionReference

from .claims import StrategyClaims, on_ranks, refused, run_claim, weights_of

FIRST, LAST, EVERY = "the first rank", "the last rank", "every rank"


class FailingSaveClaims(StrategyClaims):
    """save_ckpt, load_ckpt and save_model with a failing disk."""

    def trained(self, steps: int = 1, **settings: Any) -> tuple[StrategyBase, Any, Any]:
        strategy = self.strategy(**settings)
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        self.train(strategy, model, optimizer, steps=steps)
        return strategy, model, optimizer

    def is_hit(self, strategy: StrategyBase, whom: str) -> bool:
        return whom == EVERY or strategy.rank == (0 if whom == FIRST else self.world_size - 1)

    @pytest.mark.parametrize("whom", [FIRST, LAST, pytest.param(EVERY, marks=pytest.mark.full)])
    @on_ranks
    def test_a_rank_that_cannot_write_fails_the_save_of_all(self, whom: str) -> None:
        strategy, model, optimizer = self.trained()
        saying = ["could not be written", "ulimit -f", "unchanged"]
        for asynchronous in (False, True):
            folder = self.folder / f"asynchronous_{asynchronous}"
            strategy.save_ckpt(model, folder, client_state={"step": 1})
            limit = limited_file_size(4096) if self.is_hit(strategy, whom) else contextlib.nullcontext()
            with refused(CheckpointError, saying=saying), limit:
                strategy.save_ckpt(model, folder, client_state={"step": 2}, asynchronous=asynchronous)
                strategy.finish_checkpoint()
            # Step 1 loads, nothing incomplete is left, and the next save succeeds.
            strategy.barrier()
            assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_1"]
            strategy.barrier()
            expected = weights_of(strategy, model)
            assert strategy.load_ckpt(model, folder).client_state == {"step": 1}
            self.assert_same_weights(weights_of(strategy, model), expected, exact=True)
            self.train(strategy, model, optimizer)
            strategy.save_ckpt(model, folder, client_state={"step": 3})
            assert whole_checkpoints(folder) == ["step_3", "step_1"]

    def test_a_disk_that_fills_during_a_save_is_measured(self, rank_pools: Any, tmp_path: Path) -> None:
        pool, suite = rank_pools(self.world_size), FunctionReference.of(type(self))
        probe, disk = tmp_path / "probe", tmp_path / "disk"
        probe.mkdir()
        pool.run(run_claim, suite, "_save_once", probe, {}, timeout=self.timeout)
        one = folder_size(probe)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(small_disk(disk, int(1.6 * one)))
            except PermissionError as error:
                pytest.skip(str(error))
            messages = pool.run(run_claim, suite, "_fill_the_disk", disk, {}, timeout=self.timeout)
        for message in messages:
            assert "are missing; free them, or keep fewer checkpoints (--max_ckpt_num)" in message
            assert str(disk / "step_2") in message

    def _save_once(self) -> None:
        strategy, model, _ = self.trained()
        strategy.save_ckpt(model, self.folder, client_state={"step": 1})

    def _fill_the_disk(self) -> str:
        strategy, model, _ = self.trained()
        strategy.save_ckpt(model, self.folder, client_state={"step": 1}, max_num=1)
        expected = weights_of(strategy, model)
        with pytest.raises(CheckpointError) as caught:
            strategy.save_ckpt(model, self.folder, client_state={"step": 2}, max_num=1)
        strategy.barrier()
        assert sorted(path.name for path in self.folder.iterdir()) == ["latest", "step_1"]
        assert strategy.load_ckpt(model, self.folder).client_state == {"step": 1}
        self.assert_same_weights(weights_of(strategy, model), expected, exact=True)
        return str(caught.value)

    @on_ranks
    def test_a_model_that_cannot_be_written_fails_on_all_ranks(self) -> None:
        strategy, model, _ = self.trained()
        strategy.save_model(model, None, self.folder / "model")
        before = sorted(path.name for path in (self.folder / "model").iterdir())
        strategy.barrier()
        limit = limited_file_size(4096) if strategy.is_rank_0() else contextlib.nullcontext()
        with refused(CheckpointError, saying=["could not be written", "ulimit -f"]), limit:
            strategy.save_model(model, None, self.folder / "model", bucket_bytes=2**14)
        strategy.barrier()
        assert sorted(path.name for path in self.folder.iterdir()) == ["model"]
        assert sorted(path.name for path in (self.folder / "model").iterdir()) == before
        strategy.barrier()
        strategy.save_model(model, None, self.folder / "other")

    @on_ranks
    def test_a_rank_that_cannot_read_fails_the_load_of_all(self) -> None:
        strategy, model, _ = self.trained()
        strategy.save_ckpt(model, self.folder)
        last = self.world_size - 1
        unreadable = refusing_files(self.folder, OSError(errno.EIO, "Input/output error"))
        broken = unreadable if strategy.rank == last else contextlib.nullcontext()
        with refused(CheckpointError, saying=["Input/output error"]), broken:
            strategy.load_ckpt(model, self.folder)
        strategy.load_ckpt(model, self.folder)

    @on_ranks
    def test_a_rank_that_cannot_read_halfway_fails_the_load_of_all(self) -> None:
        """After the digests were found right; some backends are then amid an exchange, which ends by the deadline."""
        strategy, model, _ = self.trained(dist_timeout=4.0)
        strategy.save_ckpt(model, self.folder)
        with contextlib.ExitStack() as stack:
            fault = refusing_files(self.folder, OSError(errno.EIO, "Input/output error"))
            if strategy.rank == self.world_size - 1:
                stack.enter_context(calling_first(strategy, "read_state", lambda: stack.enter_context(fault)))
            stack.enter_context(refused(CheckpointError, OSError, RankTimeoutError, saying=["Input/output error"]))
            strategy.load_ckpt(model, self.folder)
