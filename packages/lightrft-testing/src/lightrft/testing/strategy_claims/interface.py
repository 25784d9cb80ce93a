"""Names, arguments and defaults: a script for one backend works with every other one."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import random
from typing import Any

import numpy
import pytest
import torch

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import ConfigError
from lightrft.strategy.strategy_base import StrategyBase

from .claims import StrategyClaims, on_ranks, refused

REQUIRED = inspect.Parameter.empty
ANY = object()
# Arguments in their order, with their defaults; a backend may add further ones that have a default.
DOCUMENTED: dict[str, dict[str, Any]] = {
    "setup_distributed": {"timeout": None},
    "create_optimizer": {"model": REQUIRED, "**": "kwargs"},
    "prepare": {"*": "models", "is_rlhf": False},
    "backward": {"loss": REQUIRED, "model": REQUIRED, "optimizer": REQUIRED, "**": "kwargs"},
    "optimizer_step": {"optimizer": REQUIRED, "model": REQUIRED, "scheduler": ANY, "name": ANY, "**": "kwargs"},
    "save_ckpt": {"model": REQUIRED, "save_dir": REQUIRED, "**": "kwargs"},
    "load_ckpt": {"model": REQUIRED, "load_dir": REQUIRED, "**": "kwargs"},
    "all_reduce": {"data": REQUIRED, "op": "mean"},
    "all_gather": {"data": REQUIRED},
    "print": {"*": ANY},
    "is_rank_0": {},
    "get_rank": {},
    "unwrap_model": {"model": REQUIRED},
    "report_memory": {"prefix": ""},
    "prepare_model": {"model": REQUIRED, "shard_size": ANY},
    "prepare_models_and_optimizers": {
        "actor": REQUIRED,
        "critic": REQUIRED,
        "reward_models": REQUIRED,
        "initial_model": REQUIRED,
        "args": REQUIRED,
        "max_steps": REQUIRED,
    },
    "setup_dataloader": {"replay_buffer": REQUIRED, "batch_size": REQUIRED, "pin_memory": False, "shuffle": True},
    "moving_average": {"model": REQUIRED, "model_ema": REQUIRED, "beta": 0.992},
    "init_model_context": {"meta_init": False},
    "offload_model": {"model": REQUIRED},
    "reload_model": {"model": REQUIRED},
    "maybe_load_optimizer": {"optimizer": REQUIRED},
    "maybe_offload_optimizer": {"optimizer": REQUIRED},
    "setup_inference_engine": {"args": REQUIRED, "engine_type": "vllm", "actor": None},
    "update_engine_weights": {"actor": REQUIRED},
    "gather_and_generate": {
        "sampling_params": REQUIRED,
        "all_prompt_token_ids": None,
        "all_prompts": None,
        "all_images": None,
        "images_num": None,
        "sleep_engine": True,
    },
    "engine_generate_local": {"sampling_params": REQUIRED},
    "wakeup_inference_engine": {},
    "maybe_sleep_inference_engine": {},
    "engines_sleep": {"engines": REQUIRED},
    "engines_wake_up": {"engines": REQUIRED},
    "sync_and_clear_cache": {},
    "save_model": {"model": REQUIRED, "tokenizer": REQUIRED, "output_dir": REQUIRED},
}
LONG_SEQUENCES = {
    "packing_samples": True,
    "fused_linear_logprob": True,
    "chunk_size": 3,
    "gradient_checkpointing": True,
}


class InterfaceClaims(StrategyClaims):
    """Signatures, construction, and what works before set-up."""

    @pytest.mark.parametrize("method", DOCUMENTED)
    @on_ranks
    def test_method_takes_the_documented_arguments(self, method: str) -> None:
        given = inspect.signature(getattr(type(self.strategy()), method)).parameters
        wanted = DOCUMENTED[method]
        kinds = {"*": inspect.Parameter.VAR_POSITIONAL, "**": inspect.Parameter.VAR_KEYWORD}
        for mark, kind in kinds.items():
            if mark in wanted:
                assert any(p.kind is kind for p in given.values()), f"{method} takes no {mark} arguments"
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [name for name, p in given.items() if p.kind is positional and name != "self"]
        expected = [name for name in wanted if name not in kinds]
        if "*" not in wanted:
            assert names[: len(expected)] == expected
        for name in expected:
            if wanted[name] is not ANY:
                assert given[name].default == wanted[name], f"{method}({name}=...) has another default"
        added = [p for name, p in given.items() if name not in ("self", *expected) and p.kind not in kinds.values()]
        assert all(p.default is not REQUIRED for p in added), f"{method} demands more than the documents say"

    @on_ranks
    def test_properties_of_the_documents_exist(self) -> None:
        strategy = self.strategy()
        assert strategy.inference_engine is None
        assert strategy.inference_engine_status.name in ("SLEEPED", "WAKEUP")

    @on_ranks
    def test_it_is_a_strategy_and_keeps_the_args_object_untouched(self) -> None:
        args = StrategyConfig(**self.settings(), extra_args={"mine": 3})
        before = repr(args)
        strategy = self.make_strategy(args=args)
        assert isinstance(strategy, StrategyBase)
        assert strategy.args is args
        assert repr(args) == before
        assert strategy.config.get_extra_arg("mine") == 3

    @on_ranks
    def test_settings_stay_as_they_were_given(self) -> None:
        """Also those of long sequences, for which a backend has no code: models are made as the strategy's say."""
        given = self.settings(**LONG_SEQUENCES, sp_size=self.world_size)
        strategy = self.make_strategy(**given)
        strategy.setup_distributed()
        changed = {name: held for name, value in given.items() if (held := getattr(strategy.config, name)) != value}
        assert not changed, f"the strategy has {changed}"

    @on_ranks
    def test_constructor_keywords_win_over_args(self) -> None:
        args = StrategyConfig(**self.settings())
        sizes = {"micro_train_batch_size": 1, "train_batch_size": 4 * self.world_size}
        given = {"seed": 11, "max_norm": 0.25, **sizes}
        strategy = self.make_strategy(args=args, **given)
        assert {name: getattr(strategy.config, name) for name in given} == given

    @on_ranks
    def test_an_unknown_setting_is_refused_by_name(self) -> None:
        with refused(ConfigError, TypeError, saying=["no_such_setting"]):
            self.strategy(no_such_setting=1)

    @on_ranks
    def test_rank_and_print_work_before_set_up(self) -> None:
        strategy = self.strategy()
        told = int(os.environ["RANK"]) if self.world_size > 1 else 0
        assert strategy.get_rank() == strategy.rank == told
        assert strategy.is_rank_0() == (told == 0)
        with contextlib.redirect_stdout(io.StringIO()) as written:
            strategy.print("works before set-up")
        assert written.getvalue() == ("works before set-up\n" if told == 0 else "")

    @on_ranks
    def test_set_up_may_be_repeated_and_left_out(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        strategy.setup_distributed(timeout=30)
        strategy.setup_distributed()
        assert strategy.world_size == self.world_size
        assert strategy.get_rank() == strategy.rank
        lazy = self.strategy()
        assert lazy.all_reduce(1, "sum") == self.world_size

    @on_ranks
    def test_only_rank_0_prints(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            strategy.print("a", 1, {"b": 2}, end="!\n", flush=False)
        assert written.getvalue() == ("a 1 {'b': 2}!\n" if strategy.get_rank() == 0 else "")

    @on_ranks
    def test_ranks_agree_on_the_seeded_random_state(self) -> None:
        strategy = self.strategy(seed=123)
        strategy.setup_distributed()
        drawn = [random.random(), float(numpy.random.rand()), torch.rand(()).item()]
        assert strategy.all_gather_object(drawn) == [drawn] * self.world_size
        again = self.strategy(seed=123)
        again.setup_distributed()
        again.set_seed(123)
        assert [random.random(), float(numpy.random.rand()), torch.rand(()).item()] == drawn

    @on_ranks
    def test_every_rank_has_its_place_in_the_layout(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        places = strategy.all_gather_object((strategy.rank, strategy.data_parallel_rank))
        assert places == [(rank, rank) for rank in range(self.world_size)]
        assert strategy.data_parallel_size == self.world_size

    @on_ranks
    def test_sizes_that_do_not_divide_the_world_are_refused_on_every_rank(self) -> None:
        wrong = self.world_size + 1
        with refused(ConfigError, saying=["--engine_tp_size", str(wrong), f"world size {self.world_size}"]):
            self.strategy(engine_tp_size=wrong).setup_distributed()

    @on_ranks
    def test_unknown_arguments_of_a_step_are_refused(self) -> None:
        strategy = self.strategy()
        model = strategy.prepare(self.model())
        optimizer = strategy.create_optimizer(model)
        loss = torch.zeros((), requires_grad=True)
        with refused(TypeError, ValueError, saying=["no_such_thing"]):
            strategy.backward(loss, model, optimizer, no_such_thing=1)
        with refused(TypeError, ValueError, saying=["no_such_thing"]):
            strategy.optimizer_step(optimizer, model, None, no_such_thing=1)

    @on_ranks
    def test_memory_is_reported_in_figures_and_printed_with_its_prefix(self) -> None:
        strategy = self.strategy()
        strategy.setup_distributed()
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            figures = strategy.report_memory(prefix="after set-up")
        assert figures
        assert all(isinstance(value, float) and value >= 0 for value in figures.values())
        if strategy.is_rank_0():
            assert "after set-up" in written.getvalue()
            assert all(name in written.getvalue() for name in figures)
        strategy.sync_and_clear_cache()
