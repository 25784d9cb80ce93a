"""Checkpoints: a run continues from one as if it had not stopped; a damaged one is named and skipped."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.testing.faults import background_writes_held_back, cut, die, flip_bit, watch_file_events
from lightrft.testing.ranks import FunctionReference, RankPool

from .claims import StrategyClaims, constant_schedule, moments_of, on_ranks, refused, run_claim, weights_of

FOREIGN = ("notes", "step_7", ".hidden")


class CheckpointClaims(StrategyClaims):
    """save_ckpt and load_ckpt."""

    def fresh(self, *, seed: int = 0, kind: str = "qwen2", **settings: Any) -> tuple[StrategyBase, Any, Any, Any]:
        """(strategy, model, optimizer, scheduler), ready to train."""
        strategy = self.strategy(**settings)
        model = self.model(kind, seed=seed)
        optimizer = strategy.create_optimizer(model)
        scheduler = constant_schedule(optimizer)
        model, optimizer, scheduler = strategy.prepare((model, optimizer, scheduler))
        return strategy, model, optimizer, scheduler

    @pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "qwen3_moe"])
    @on_ranks
    def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(self, kind: str) -> None:
        strategy, model, optimizer, scheduler = self.fresh(kind=kind, max_norm=0.5)
        self.train(strategy, model, optimizer, steps=2, scheduler=scheduler)
        torch.manual_seed(50 + strategy.rank)  # the ranks' random states differ
        random.seed(60 + strategy.rank)
        numpy.random.seed(70 + strategy.rank)
        strategy.save_ckpt(model, self.folder, tag="here", scheduler=scheduler, client_state={"step": 2})
        drawn = _draw()
        norms = self.train(strategy, model, optimizer, steps=2, first=2, scheduler=scheduler)
        expected = weights_of(strategy, model), moments_of(strategy, model, optimizer)

        other, resumed, its_optimizer, its_scheduler = self.fresh(kind=kind, max_norm=0.5, seed=9)
        loaded = other.load_ckpt(resumed, self.folder, scheduler=its_scheduler, optimizer=its_optimizer)
        path, client_state = loaded
        assert Path(path) == self.folder / "here"
        assert client_state == {"step": 2}
        assert _draw() == drawn
        assert its_scheduler.state_dict() == {**its_scheduler.state_dict(), "last_epoch": 2}
        again = self.train(other, resumed, its_optimizer, steps=2, first=2, scheduler=its_scheduler)
        assert [result.grad_norm for result in again] == [result.grad_norm for result in norms]
        self.assert_same_weights(weights_of(other, resumed), expected[0], exact=True)
        self.assert_same_weights(moments_of(other, resumed, its_optimizer), expected[1], exact=True)
        assert its_scheduler.get_last_lr() == scheduler.get_last_lr()

    @on_ranks
    def test_a_checkpoint_taken_before_the_first_step_resumes_too(self) -> None:
        strategy, model, optimizer, scheduler = self.fresh()
        strategy.save_ckpt(model, self.folder, optimizer=optimizer, scheduler=scheduler)
        self.train(strategy, model, optimizer, scheduler=scheduler)
        other, resumed, its_optimizer, its_scheduler = self.fresh(seed=9)
        self.train(other, resumed, its_optimizer, steps=2, scheduler=its_scheduler)  # what must not shine through
        other.load_ckpt(resumed, self.folder)
        assert its_scheduler.last_epoch == 0
        self.train(other, resumed, its_optimizer, scheduler=its_scheduler)
        self.assert_same_weights(weights_of(other, resumed), weights_of(strategy, model), exact=True)
        self.assert_same_weights(
            moments_of(other, resumed, its_optimizer), moments_of(strategy, model, optimizer), exact=True
        )

    @on_ranks
    def test_an_optimizer_of_the_users_own_resumes_or_cannot_be_saved(self) -> None:
        of_ones_own: dict[str, Callable[[Any], Any]] = {
            "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True),
            "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
            "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-2),  # has a state that is one number
        }
        for name, make in of_ones_own.items():
            made = []
            for seed in (0, 9):
                strategy, model = self.strategy(), self.model(seed=seed)
                made.append((strategy, *strategy.prepare((model, make(model)))))
            (strategy, model, optimizer), (other, resumed, its_optimizer) = made
            self.train(strategy, model, optimizer, steps=2)
            if name == "NAdam":
                with refused(CheckpointError, saying=["mu_product"]):
                    strategy.save_ckpt(model, self.folder, tag=name)
                continue
            strategy.save_ckpt(model, self.folder, tag=name)
            self.train(strategy, model, optimizer, first=2)
            other.load_ckpt(resumed, self.folder, tag=name)
            self.train(other, resumed, its_optimizer, first=2)
            self.assert_same_weights(weights_of(other, resumed), weights_of(strategy, model), exact=True)

    @on_ranks
    def test_several_models_are_saved_together(self) -> None:
        strategy, actor, actor_optim, _ = self.fresh()
        critic = strategy.prepare(self.model(seed=1))
        critic_optim = strategy.create_optimizer(critic)
        self.train(strategy, actor, actor_optim)
        self.train(strategy, critic, critic_optim, first=1)
        strategy.save_ckpt({"actor": actor, "critic": critic}, self.folder)
        expected = {"actor": weights_of(strategy, actor), "critic": weights_of(strategy, critic)}
        other, new_actor, _, _ = self.fresh(seed=5)
        new_critic = other.prepare(self.model(seed=6))
        new_optim = other.create_optimizer(new_critic)
        other.load_ckpt({"actor": new_actor, "critic": new_critic}, self.folder)
        self.assert_same_weights(weights_of(other, new_actor), expected["actor"], exact=True)
        self.assert_same_weights(weights_of(other, new_critic), expected["critic"], exact=True)
        self.assert_same_weights(
            moments_of(other, new_critic, new_optim), moments_of(strategy, critic, critic_optim), exact=True
        )
        with refused(CheckpointError, saying=["reward", "actor", "critic"]):
            other.load_ckpt({"reward": new_actor}, self.folder)

    @on_ranks
    def test_each_rank_gets_back_what_it_and_the_others_gave(self) -> None:
        strategy, model, _, _ = self.fresh()
        strategy.setup_distributed()
        mine = {"buffer": torch.arange(strategy.rank + 1), "count": torch.tensor(strategy.rank)}
        client = {"step": 3, "nested": {"list": [1, 2.5, "x", None, True]}}
        strategy.save_ckpt(model, self.folder, client_state=client, rank_state=mine)
        loaded = strategy.load_ckpt(model, self.folder)
        assert loaded.client_state == client
        assert loaded.world_size == self.world_size
        assert [state["buffer"].tolist() for state in loaded.rank_states] == [
            list(range(rank + 1)) for rank in range(self.world_size)
        ]
        assert loaded.path.name == "step_3"

    @on_ranks
    def test_weights_alone_can_be_loaded(self) -> None:
        strategy, model, optimizer, scheduler = self.fresh()
        self.train(strategy, model, optimizer, steps=2, scheduler=scheduler)
        strategy.save_ckpt(model, self.folder)
        expected = weights_of(strategy, model)
        for keywords in (
            {"load_module_only": True},
            {"load_optimizer_states": False, "load_lr_scheduler_states": False},
        ):
            other, fresh, its_optimizer, its_scheduler = self.fresh(seed=9)
            self.train(other, fresh, its_optimizer, scheduler=its_scheduler)
            moments = moments_of(other, fresh, its_optimizer)
            other.load_ckpt(fresh, self.folder, **keywords)
            self.assert_same_weights(weights_of(other, fresh), expected, exact=True)
            self.assert_same_weights(moments_of(other, fresh, its_optimizer), moments, exact=True)
            assert its_scheduler.last_epoch == 1

    @on_ranks
    def test_pruning_spares_the_newest_and_what_is_not_ours(self) -> None:
        strategy, model, _, _ = self.fresh()
        strategy.setup_distributed()
        if strategy.is_rank_0():
            for name in FOREIGN:
                (self.folder / name).mkdir()
                (self.folder / name / "data").write_text("precious")
        strategy.barrier()
        for step in range(1, 5):
            strategy.save_ckpt(model, self.folder, client_state={"step": step}, max_num=2)
            strategy.barrier()
        assert _ours(self.folder) == ["step_3", "step_4"]
        strategy.barrier()
        strategy.save_ckpt(model, self.folder, client_state={"step": 5}, max_mem=1e-9)
        assert _ours(self.folder) == ["step_5"], "the newest stays, however small the limit"
        assert all((self.folder / name / "data").read_text() == "precious" for name in FOREIGN)
        assert (self.folder / "latest").read_text().strip() == "step_5"
        for limit in ({"max_num": 0}, {"max_num": -1}, {"max_mem": 0}):
            with refused(ValueError, saying=[next(iter(limit))]):
                strategy.save_ckpt(model, self.folder, **limit)

    @on_ranks
    def test_saving_twice_under_one_name_replaces(self) -> None:
        strategy, model, optimizer, _ = self.fresh()
        strategy.save_ckpt(model, self.folder, tag="same", client_state={"n": 1})
        self.train(strategy, model, optimizer)
        expected = weights_of(strategy, model)
        strategy.save_ckpt(model, self.folder, tag="same", client_state={"n": 2})
        other, resumed, _, _ = self.fresh(seed=9)
        assert other.load_ckpt(resumed, self.folder, tag="same").client_state == {"n": 2}
        self.assert_same_weights(weights_of(other, resumed), expected, exact=True)
        assert _ours(self.folder) == ["same"]

    @on_ranks
    def test_client_state_that_is_no_json_is_refused(self) -> None:
        strategy, model, _, _ = self.fresh()
        with refused(ValueError, saying=["client_state", "JSON"]):
            strategy.save_ckpt(model, self.folder, client_state={"tensor": torch.zeros(1)})
        assert not any(self.folder.iterdir())

    @on_ranks
    def test_an_unknown_keyword_is_refused(self) -> None:
        strategy, model, _, _ = self.fresh()
        with refused(TypeError, ValueError, saying=["no_such_keyword"]):
            strategy.save_ckpt(model, self.folder, no_such_keyword=1)
        with refused(TypeError, ValueError, saying=["no_such_keyword"]):
            strategy.load_ckpt(model, self.folder, no_such_keyword=1)

    @on_ranks
    def test_a_folder_without_checkpoints_is_named(self) -> None:
        strategy, model, _, _ = self.fresh()
        with refused(CheckpointError, saying=[str(self.folder)]):
            strategy.load_ckpt(model, self.folder)
        with refused(CheckpointError, saying=["step_9"]):
            strategy.load_ckpt(model, self.folder, tag="step_9")
        with refused(CheckpointError, saying=["nowhere"]):
            strategy.load_ckpt(model, self.folder / "nowhere")

    @on_ranks
    def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_without(self) -> None:
        strategy, model, optimizer, _ = self.fresh()
        self.train(strategy, model, optimizer)
        strategy.save_ckpt(model, self.folder / "whole", client_state={"step": 1})
        expected = weights_of(strategy, model)
        self.train(strategy, model, optimizer, first=1)
        strategy.save_ckpt(model, self.folder / "whole", client_state={"step": 2})
        for damage in ("cut", "flipped", "missing", "no manifest", "garbled manifest"):
            folder = self.folder / damage
            if strategy.is_rank_0():
                shutil.copytree(self.folder / "whole", folder)
                _damage(folder / "step_2", damage)
            strategy.barrier()
            other, resumed, its_optimizer, _ = self.fresh(seed=9)
            before = weights_of(other, resumed)
            with refused(CheckpointError, saying=["step_2"]):
                other.load_ckpt(resumed, folder, tag="step_2")
            self.assert_same_weights(weights_of(other, resumed), before, exact=True)
            loaded = other.load_ckpt(resumed, folder)
            assert loaded.path.name == "step_1", damage
            assert loaded.client_state == {"step": 1}
            assert len(loaded.skipped) == 1 or "manifest" in damage
            self.assert_same_weights(weights_of(other, resumed), expected, exact=True)
            assert self.train(other, resumed, its_optimizer, first=1)[0].stepped

    @on_ranks
    def test_when_all_are_damaged_each_is_named(self) -> None:
        strategy, model, _, _ = self.fresh()
        for step in (1, 2):
            strategy.save_ckpt(model, self.folder, client_state={"step": step})
        strategy.barrier()
        if strategy.is_rank_0():
            for step in (1, 2):
                _damage(self.folder / f"step_{step}", "flipped")
        strategy.barrier()
        with refused(CheckpointError, saying=["step_1", "step_2"]):
            strategy.load_ckpt(model, self.folder)

    @on_ranks
    def test_a_checkpoint_of_another_model_names_the_first_difference(self) -> None:
        strategy, model, _, _ = self.fresh()
        strategy.save_ckpt(model, self.folder)
        other, stranger, _, _ = self.fresh(kind="llama")
        with refused(CheckpointError, saying=["another model", "bias"]):
            other.load_ckpt(stranger, self.folder)
        from lightrft.testing.tiny_models import tiny_model

        wider = other.prepare(tiny_model("qwen2", intermediate_size=96))
        with refused(CheckpointError, saying=["mlp", "128", "96"]):
            other.load_ckpt(wider, self.folder)

    @on_ranks
    def test_what_was_saved_must_have_somewhere_to_go(self) -> None:
        """A run whose optimizer or schedule silently starts anew is not resumed."""
        strategy, model, optimizer, scheduler = self.fresh()
        self.train(strategy, model, optimizer, scheduler=scheduler)
        strategy.save_ckpt(model, self.folder)
        other = self.strategy()
        bare = other.prepare(self.model(seed=9))
        before = weights_of(other, bare)
        with refused(CheckpointError, saying=["create_optimizer", "load_optimizer_states=False"]):
            other.load_ckpt(bare, self.folder)
        its_optimizer = other.create_optimizer(bare)
        with refused(CheckpointError, saying=["scheduler=", "load_lr_scheduler_states=False"]):
            other.load_ckpt(bare, self.folder)
        self.assert_same_weights(weights_of(other, bare), before, exact=True)
        its_scheduler = constant_schedule(its_optimizer)
        other.load_ckpt(bare, self.folder, scheduler=its_scheduler)
        assert its_scheduler.last_epoch == 1

    @on_ranks
    def test_half_a_model_is_not_loaded(self) -> None:
        strategy, model, _, _ = self.fresh()
        strategy.save_ckpt(model, self.folder)
        with refused(ValueError, saying=["load_module_strict"]):
            strategy.load_ckpt(model, self.folder, load_module_strict=False)

    @on_ranks
    def test_an_asynchronous_save_holds_the_state_of_its_moment(self) -> None:
        strategy, model, optimizer, scheduler = self.fresh()
        self.train(strategy, model, optimizer, scheduler=scheduler)
        expected = weights_of(strategy, model), moments_of(strategy, model, optimizer)
        with background_writes_held_back():
            strategy.save_ckpt(model, self.folder, client_state={"step": 1}, asynchronous=True)
            self.train(strategy, model, optimizer, steps=2, first=1, scheduler=scheduler)
        assert strategy.finish_checkpoint()
        assert strategy.finish_checkpoint()
        other, resumed, its_optimizer, its_scheduler = self.fresh(seed=9)
        assert other.load_ckpt(resumed, self.folder).client_state == {"step": 1}
        self.assert_same_weights(weights_of(other, resumed), expected[0], exact=True)
        self.assert_same_weights(moments_of(other, resumed, its_optimizer), expected[1], exact=True)
        assert its_scheduler.last_epoch == 1

    @on_ranks
    def test_the_next_save_completes_the_one_under_way(self) -> None:
        strategy, model, _, _ = self.fresh()
        strategy.save_ckpt(model, self.folder, client_state={"step": 1}, asynchronous=True)
        strategy.save_ckpt(model, self.folder, client_state={"step": 2})
        assert _ours(self.folder) == ["step_1", "step_2"]

    @on_ranks
    def test_state_moves_to_and_from_the_reference_by_name(self) -> None:
        strategy, model, optimizer, _ = self.fresh()
        untrained = list(strategy.iter_state(model, optimizer))
        self.train(strategy, model, optimizer, steps=2)
        items = list(strategy.iter_state(model, optimizer))
        reference = self.reference()
        plain = reference.prepare(self.model(seed=9))
        plain_optimizer = reference.create_optimizer(plain)
        reference.load_state(plain, plain_optimizer, items)
        self.assert_same_weights(weights_of(reference, plain), weights_of(strategy, model), exact=True)
        self.train(reference, plain, plain_optimizer, first=2)
        self.train(strategy, model, optimizer, first=2)
        self.assert_same_weights(weights_of(strategy, model), weights_of(reference, plain))
        back, resumed, its_optimizer, _ = self.fresh(seed=8)
        back.load_state(resumed, its_optimizer, reference.iter_state(plain, plain_optimizer))
        self.assert_same_weights(weights_of(back, resumed), weights_of(reference, plain), exact=True)
        self.train(back, resumed, its_optimizer, first=3)
        self.train(reference, plain, plain_optimizer, first=3)
        self.assert_same_weights(weights_of(back, resumed), weights_of(reference, plain))
        reference.load_state(plain, plain_optimizer, untrained)
        assert not moments_of(reference, plain, plain_optimizer), "what had not stepped has no moments"

    @on_ranks
    def test_state_of_another_model_is_refused(self) -> None:
        strategy, model, optimizer, _ = self.fresh()
        items = list(strategy.iter_state(model, optimizer))
        with refused(CheckpointError, saying=[items[-1].name]):
            strategy.load_state(model, optimizer, items[:-1])
        narrow = replace(items[0], weight=items[0].weight[:1])  # which a copy would repeat for each row
        with refused(CheckpointError, saying=[items[0].name, "in the checkpoint"]):
            strategy.load_state(model, optimizer, [narrow, *items[1:]])

    # ---- killed while saving -----------------------------------------------------------------------------------------
    @pytest.mark.parametrize("share", [pytest.param(0.3, marks=pytest.mark.full), 0.95])
    def test_a_run_killed_in_the_middle_of_a_save_keeps_the_earlier_checkpoint(
        self, rank_pools: Any, tmp_path: Path, share: float
    ) -> None:
        victim = self.world_size - 1 if share < 0.5 else 0
        self.kill_while_saving(rank_pools(self.world_size), tmp_path, share, victim)

    @pytest.mark.full
    @pytest.mark.parametrize("percent", range(0, 100, 4))
    def test_a_run_killed_at_any_moment_of_a_save_keeps_a_checkpoint(
        self, rank_pools: Any, tmp_path: Path, percent: int
    ) -> None:
        self.kill_while_saving(rank_pools(self.world_size), tmp_path, percent / 100, percent % self.world_size)

    def kill_while_saving(self, pool: RankPool, folder: Path, share: float, victim: int) -> None:
        """Kill ``victim`` at ``share`` of its file operations of a save, and load on fresh ranks."""
        suite = FunctionReference.of(type(self))

        def claim(name: str, **params: Any) -> tuple[Any, ...]:
            return run_claim, suite, name, folder, params

        [count, *_] = pool.run(*claim("_count_file_events"), timeout=self.timeout)
        shutil.rmtree(folder)
        folder.mkdir()
        nth = 1 + int(share * (count[victim] - 1))
        job = pool.submit(*claim("_die_while_saving", nth=nth, victim=victim))
        outcomes = job.outcomes(self.timeout, grace=1.0)
        assert outcomes[victim].died == -signal.SIGKILL, outcomes[victim].error
        pool.run(*claim("_load_after_the_kill"), timeout=self.timeout)

    def _save_twice(self, before_second: Any) -> None:
        strategy, model, optimizer, scheduler = self.fresh()
        self.train(strategy, model, optimizer, scheduler=scheduler)
        strategy.save_ckpt(model, self.folder, client_state={"step": 1}, max_num=1)
        self.train(strategy, model, optimizer, first=1, scheduler=scheduler)
        strategy.barrier()
        before_second(strategy)
        strategy.save_ckpt(model, self.folder, client_state={"step": 2}, max_num=1)

    def _count_file_events(self) -> list[int]:
        strategies: list[StrategyBase] = []
        counts = [0]

        def watch(strategy: StrategyBase) -> None:
            strategies.append(strategy)
            watch_file_events(self.folder, lambda count: counts.__setitem__(0, count))

        self._save_twice(watch)
        return strategies[0].all_gather_object(counts[0])

    def _die_while_saving(self, nth: int, victim: int) -> None:
        def arm(strategy: StrategyBase) -> None:
            if strategy.rank == victim:
                watch_file_events(self.folder, lambda count: die() if count == nth else None)

        self._save_twice(arm)
        raise AssertionError(f"the save made fewer than {nth} file operations")

    def _load_after_the_kill(self) -> None:
        strategy, model, optimizer, scheduler = self.fresh(seed=9)
        loaded = strategy.load_ckpt(model, self.folder)
        step = loaded.client_state["step"]
        assert step in (1, 2)
        assert scheduler.last_epoch == step
        twin, plain, plain_optimizer, plain_scheduler = self.fresh()
        self.train(twin, plain, plain_optimizer, steps=step, scheduler=plain_scheduler)
        self.assert_same_weights(weights_of(strategy, model), weights_of(twin, plain), exact=True)
        self.assert_same_weights(
            moments_of(strategy, model, optimizer), moments_of(twin, plain, plain_optimizer), exact=True
        )
        strategy.save_ckpt(model, self.folder, client_state={"step": 3}, max_num=1)
        assert _ours(self.folder) == ["step_3"], "what the dead run left behind does not disturb the next save"


def _draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(numpy.random.rand()), float(numpy.random.randn())]


def _ours(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/manifest.json") if not path.parent.name.startswith("."))


def _damage(checkpoint: Path, how: str) -> None:
    manifest = checkpoint / "manifest.json"
    largest = max((p for p in checkpoint.rglob("*") if p.is_file() and p != manifest), key=lambda p: p.stat().st_size)
    if how == "cut":
        cut(largest)
    elif how == "flipped":
        flip_bit(largest)
    elif how == "missing":
        largest.unlink()
    elif how == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:100])
