"""The strategy's side of a rollout: set-up, sleep and wake, weight sync with receipts, distributed generation."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.engine import EngineCapabilities, Placement
from lightrft.strategy.errors import (
    EngineStateError,
    PluginError,
    RolloutError,
    StaleWeightsError,
    WeightSyncError,
)
from lightrft.strategy.lifecycle import EngineStatus, KVCache, Weights
from lightrft.strategy.registry import register_engine
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.testing.fake_engine import FakeEngine

from .claims import StrategyClaims, on_ranks, refused


class SplitEngine(FakeEngine):
    """A fake engine of several ranks, all of which run it."""

    name: ClassVar[str] = "split"
    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(devices=("cpu", "cuda"), tensor_parallel=True)


class LedEngine(SplitEngine):
    """A fake engine of several ranks, which the first of them owns."""

    name: ClassVar[str] = "led"
    placement: ClassVar[Placement] = "leader"


class LameEngine(FakeEngine):
    """A fake engine that the last rank cannot start."""

    name: ClassVar[str] = "lame"

    def _start(self, spec: Any, group: Any) -> None:
        if dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError("no room")
        super()._start(spec, group)


class RolloutClaims(StrategyClaims):
    """setup_inference_engine, gather_and_generate, update_engine_weights, sleeping and waking."""

    def rollout(self, *, engine: str = "fake", actor: bool = True, **settings: Any) -> tuple[StrategyBase, Any, Any]:
        """(strategy, actor, engine)."""
        for cls in (SplitEngine, LedEngine):
            register_engine(cls.name, cls)
        strategy = self.strategy(**settings)
        model = strategy.prepare(self.model()) if actor else None
        handle = strategy.setup_inference_engine(None, engine_type=engine, actor=model)
        return strategy, model, handle

    @on_ranks
    def test_an_engine_that_one_rank_cannot_start_is_an_error_on_all(self) -> None:
        if self.world_size == 1:
            return  # there is no other rank to tell
        strategy, last = self.strategy(), self.world_size - 1
        strategy.setup_distributed()
        register_engine(LameEngine.name, LameEngine)
        kind, words = (ValueError, "no room") if strategy.rank == last else (RolloutError, f"rank {last}")
        with refused(kind, saying=[words]):
            strategy.setup_inference_engine(None, engine_type="lame")
        assert strategy.inference_engine is None
        strategy.setup_inference_engine(None, engine_type="fake")  # another may be set up

    # ---- generation --------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("counts", ["even", "uneven", "only the last", "none"])
    @pytest.mark.parametrize("engine", ["fake", "split", "led"])
    @on_ranks
    def test_each_rank_gets_its_own_outputs_in_its_own_order(self, engine: str, counts: str) -> None:
        """As one process would have drawn them: a sample does not depend on its rank."""
        tp = 1 if engine == "fake" else self.world_size
        strategy, _, _ = self.rollout(engine=engine, engine_tp_size=tp)
        share = {
            "even": [2] * self.world_size,
            "uneven": [2 * rank for rank in range(self.world_size)],
            "only the last": [0] * (self.world_size - 1) + [3],
            "none": [0] * self.world_size,
        }[counts]
        prompts = [[10 + index, 20 + index % 3] for index in range(sum(share))]
        start = sum(share[: strategy.rank])
        mine = prompts[start : start + share[strategy.rank]]
        params = {"n": 2, "temperature": 1.0, "max_tokens": 5}
        outputs = strategy.gather_and_generate(params, all_prompt_token_ids=mine)
        reference = self.reference()
        reference.setup_inference_engine(None, engine_type="fake", actor=reference.prepare(self.model()))
        expected = reference.gather_and_generate(params, all_prompt_token_ids=prompts)
        assert [o.prompt_token_ids for o in outputs] == [prompt for prompt in mine for _ in range(2)]
        expected = expected[2 * start : 2 * (start + len(mine))]
        assert [o.output_token_ids for o in outputs] == [o.output_token_ids for o in expected]
        assert [o.finish_reason for o in outputs] == [o.finish_reason for o in expected]
        assert all(o.weight_version == 1 for o in outputs)
        assert all(o.logprobs is not None and len(o.logprobs) == len(o.output_token_ids) for o in outputs)
        tokens = strategy.all_gather_object([tuple(o.output_token_ids) for o in outputs])
        flat = [item for part in tokens for item in part]
        assert len(set(flat)) == len(flat), "no two samples share a seed"

    @on_ranks
    def test_samples_change_with_the_step_and_repeat_with_it(self) -> None:
        strategy, _, _ = self.rollout()
        prompts = [[5 + strategy.rank, 6]] * 2

        def draw(**keywords: Any) -> list[list[int]]:
            return [o.output_token_ids for o in strategy.gather_and_generate({"max_tokens": 6}, prompts, **keywords)]

        first, second = draw(), draw()
        assert first != second, "the strategy counts rollouts"
        assert draw(step=0) == first
        assert draw(step=1) == second

    @on_ranks
    def test_a_prompts_global_index_decides_its_seed(self) -> None:
        strategy, _, _ = self.rollout()
        swapped = strategy.gather_and_generate(
            {"max_tokens": 6}, [[7, 8]], prompt_indices=[self.world_size - 1 - strategy.rank], step=0
        )
        straight = strategy.gather_and_generate({"max_tokens": 6}, [[7, 8]], step=0)
        tokens = strategy.all_gather_object((straight[0].output_token_ids, swapped[0].output_token_ids))
        assert [a for a, _ in tokens] == [b for _, b in reversed(tokens)]
        with refused(ValueError, saying=["prompt_indices"]):
            strategy.gather_and_generate({"max_tokens": 6}, [[7, 8]], prompt_indices=[0, 1])

    @on_ranks
    def test_generation_leaves_the_trainers_random_state_alone(self) -> None:
        strategy, _, _ = self.rollout()
        torch.manual_seed(3)
        expected = torch.rand(2).tolist()
        torch.manual_seed(3)
        drawn = [torch.rand(()).item()]
        strategy.gather_and_generate({"max_tokens": 4}, [[5, 6]])
        drawn.append(torch.rand(()).item())
        assert drawn == expected

    @on_ranks
    def test_prompts_may_be_text(self) -> None:
        strategy, _, _ = self.rollout()
        outputs = strategy.gather_and_generate({"max_tokens": 3}, all_prompts=["ab", "c"])
        assert [len(o.output_token_ids) <= 3 for o in outputs] == [True, True]

    @on_ranks
    def test_one_ranks_wrong_prompts_are_refused_on_every_rank(self) -> None:
        strategy, _, _ = self.rollout()
        last = self.world_size - 1
        words = ["tokens"] if strategy.rank == last else [f"rank {last}"]
        with refused(ValueError, saying=words):
            strategy.gather_and_generate({"max_tokens": 3}, [[]] if strategy.rank == last else [[5]])
        assert len(strategy.gather_and_generate({"max_tokens": 3}, [[5]])) == 1, "nobody is left waiting"

    @on_ranks
    def test_wrong_use_of_generation_is_refused(self) -> None:
        strategy, _, _ = self.rollout()
        with refused(ValueError, saying=["all_prompt_token_ids", "all_prompts"]):
            strategy.gather_and_generate({"max_tokens": 3})
        with refused(ValueError, saying=["all_prompt_token_ids", "all_prompts"]):
            strategy.gather_and_generate({"max_tokens": 3}, [[5]], all_prompts=["a"])
        with refused(ValueError, saying=["max_token"]):
            strategy.gather_and_generate({"max_token": 3}, [[5]])
        with refused(ValueError, saying=["images_num"]):
            strategy.gather_and_generate({}, all_prompts=["a"], all_images=["x"], images_num=[2])

    @on_ranks
    def test_an_engine_that_returns_fewer_outputs_is_an_error_on_every_rank(self) -> None:
        strategy, _, engine = self.rollout()
        if strategy.rank == 0:
            engine.faults.fewer_outputs = 1
        with refused(RolloutError, saying=["1 of 2" if strategy.rank == 0 else "rank 0"]):
            strategy.gather_and_generate({"max_tokens": 3}, [[5], [6]])

    @on_ranks
    def test_an_engine_that_hangs_ends_by_its_deadline(self) -> None:
        strategy, _, engine = self.rollout(engine_timeout=0.05)
        engine.faults.hang = True
        with refused(TimeoutError, RolloutError, saying=["0.05"]):
            strategy.gather_and_generate({"max_tokens": 3}, [[5]])

    @on_ranks
    def test_a_rank_may_generate_by_itself(self) -> None:
        strategy, _, _ = self.rollout()
        if strategy.rank == 0:
            outputs = strategy.engine_generate_local({"max_tokens": 3}, [[5, 6], [7]])
            assert [o.prompt_token_ids for o in outputs] == [[5, 6], [7]]
        strategy.barrier()

    # ---- set-up ------------------------------------------------------------------------------------------------------
    @on_ranks
    def test_an_engine_may_be_set_up_before_there_is_an_actor(self) -> None:
        from lightrft.testing.tiny_models import save_tiny_model

        folder = save_tiny_model("qwen2", self.folder / f"model{self.strategy().get_rank()}")
        strategy, _, engine = self.rollout(actor=False, pretrain=folder)
        assert strategy.inference_engine is engine
        assert strategy.inference_engine_status is EngineStatus.WAKEUP
        outputs = strategy.gather_and_generate({"max_tokens": 3}, [[5]])
        assert outputs[0].weight_version == 0
        actor = strategy.prepare(self.model(seed=4))
        assert strategy.update_engine_weights(actor).version == 1

    @on_ranks
    def test_settings_of_the_engine_may_come_from_the_scripts_args(self) -> None:
        strategy = self.strategy()
        args = StrategyConfig(**self.settings(engine_sleep_level=2))
        actor = strategy.prepare(self.model())
        strategy.setup_inference_engine(args, engine_type="fake", actor=actor)
        strategy.maybe_sleep_inference_engine()
        engine = strategy.inference_engine
        assert engine is not None
        assert engine.status().weights is Weights.DROPPED

    @on_ranks
    def test_a_missing_engine_says_what_is_there(self) -> None:
        strategy = self.strategy()
        with refused(PluginError, saying=["no_such_engine", "fake"]):
            strategy.setup_inference_engine(None, engine_type="no_such_engine")

    @on_ranks
    def test_without_an_engine_every_use_says_how_to_set_one_up(self) -> None:
        strategy = self.strategy()
        actor = strategy.prepare(self.model())
        for use in (
            lambda: strategy.gather_and_generate({}, [[5]]),
            lambda: strategy.update_engine_weights(actor),
            lambda: strategy.engine_generate_local({}, [[5]]),
        ):
            with refused(EngineStateError, saying=["setup_inference_engine"]):
                use()

    @on_ranks
    def test_a_second_engine_is_refused(self) -> None:
        strategy, actor, _ = self.rollout()
        with refused(EngineStateError, saying=["already"]):
            strategy.setup_inference_engine(None, engine_type="fake", actor=actor)

    # ---- sleep -------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("level", [1, 2])
    @on_ranks
    def test_repeated_sleep_and_wake_do_nothing(self, level: int) -> None:
        strategy, _, engine = self.rollout(engine_sleep_level=level)
        assert strategy.inference_engine_status is EngineStatus.WAKEUP
        strategy.wakeup_inference_engine()
        for _ in range(2):
            strategy.maybe_sleep_inference_engine()
            assert strategy.inference_engine_status is EngineStatus.SLEEPED
            assert engine.status().weights is (Weights.OFFLOADED if level == 1 else Weights.DROPPED)
            assert engine.status().kv_cache is KVCache.RELEASED
        for _ in range(2):
            strategy.wakeup_inference_engine()
            assert strategy.inference_engine_status is EngineStatus.WAKEUP

    @on_ranks
    def test_sleep_does_nothing_where_it_is_disabled(self) -> None:
        strategy, _, _ = self.rollout(enable_engine_sleep=False)
        strategy.maybe_sleep_inference_engine()
        assert strategy.inference_engine_status is EngineStatus.WAKEUP
        strategy.gather_and_generate({"max_tokens": 2}, [[5]], sleep_engine=True)
        assert strategy.inference_engine_status is EngineStatus.WAKEUP

    @on_ranks
    def test_generating_while_asleep_wakes_first_and_sleeps_as_asked(self) -> None:
        strategy, _, _ = self.rollout()
        strategy.maybe_sleep_inference_engine()
        assert len(strategy.gather_and_generate({"max_tokens": 2}, [[5]], sleep_engine=False)) == 1
        assert strategy.inference_engine_status is EngineStatus.WAKEUP
        strategy.gather_and_generate({"max_tokens": 2}, [[5]], sleep_engine=True)
        assert strategy.inference_engine_status is EngineStatus.SLEEPED

    @on_ranks
    def test_after_a_level_2_sleep_only_a_whole_update_makes_it_generate(self) -> None:
        strategy, actor, _ = self.rollout(engine_sleep_level=2)
        strategy.maybe_sleep_inference_engine()
        with refused(StaleWeightsError, RolloutError, saying=["update_engine_weights"]):
            strategy.gather_and_generate({"max_tokens": 2}, [[5]])
        assert strategy.update_engine_weights(actor).version == 2
        assert strategy.gather_and_generate({"max_tokens": 2}, [[5]])[0].weight_version == 2

    @on_ranks
    def test_several_engines_sleep_and_wake_together(self) -> None:
        strategy, _, engine = self.rollout()
        strategy.engines_sleep([engine, None])  # on a rank whose engine another one has
        assert engine.status().status is EngineStatus.SLEEPED
        strategy.engines_wake_up([engine, None])
        assert engine.status().status is EngineStatus.WAKEUP

    # ---- weight sync -------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("verify", ["sampled", "full"])
    @pytest.mark.parametrize("bucket_mb", [1e-6, 0.031, 512.0])
    @pytest.mark.parametrize("engine", ["fake", "split", "led"])
    @on_ranks
    def test_a_sync_brings_every_weight_and_gives_a_receipt(self, engine: str, bucket_mb: float, verify: str) -> None:
        tp = 1 if engine == "fake" else self.world_size
        settings = {"engine_tp_size": tp, "weight_bucket_mb": bucket_mb, "verify_weights": verify}
        strategy, actor, handle = self.rollout(engine=engine, **settings)
        optimizer = strategy.create_optimizer(actor)
        specs = strategy.export_spec(actor)
        still = strategy.update_engine_weights(actor)
        assert still.tensors_changed == 0
        self.train(strategy, actor, optimizer)
        receipt = strategy.update_engine_weights(actor)
        assert receipt.version == still.version + 1
        assert receipt.tensors_expected == receipt.tensors_received == len(specs)
        assert receipt.tensors_changed > 0
        assert receipt.nbytes == sum(spec.nbytes for spec in specs)
        assert receipt.verified == verify
        assert receipt.digest != still.digest
        assert (receipt.buckets == 1) == (bucket_mb == 512.0)
        assert strategy.all_gather_object(receipt.digest) == [receipt.digest] * self.world_size
        expected = {item.name: item.weight for item in strategy.iter_state(actor)}
        if handle is not None:
            assert all(torch.equal(handle.weights[name].cpu(), tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("fault", ["lose_bucket", "double_bucket", "truncate", "misname", "alter", "stale"])
    @on_ranks
    def test_a_tensor_lost_doubled_or_altered_on_one_rank_is_an_error_on_all(self, fault: str) -> None:
        strategy, actor, engine = self.rollout(weight_bucket_mb=0.05)
        self.train(strategy, actor, strategy.create_optimizer(actor))
        values: dict[str, Any] = {"lose_bucket": 1, "double_bucket": 0, "stale": True}
        if strategy.rank == self.world_size - 1:
            setattr(engine.faults, fault, values.get(fault, "model.norm.weight"))
        with refused(WeightSyncError):
            strategy.update_engine_weights(actor)
        with refused(StaleWeightsError, RolloutError):
            strategy.gather_and_generate({"max_tokens": 2}, [[5]])
        setattr(engine.faults, fault, False if fault == "stale" else None)
        receipt = strategy.update_engine_weights(actor)
        assert receipt.tensors_received == receipt.tensors_expected
        assert strategy.gather_and_generate({"max_tokens": 2}, [[5]])[0].weight_version == receipt.version

    @on_ranks
    def test_a_sync_restores_the_kv_cache_only_at_its_end(self) -> None:
        strategy, actor, engine = self.rollout()
        strategy.maybe_sleep_inference_engine()
        moments = []
        engine.load_bucket = _spy(engine.load_bucket, lambda: moments.append(engine.status().kv_cache))
        strategy.update_engine_weights(actor)
        assert set(moments) == {KVCache.RELEASED}
        assert strategy.inference_engine_status is EngineStatus.WAKEUP

    @on_ranks
    def test_a_model_of_another_shape_is_refused_and_named(self) -> None:
        from lightrft.testing.tiny_models import save_tiny_model, tiny_model

        folder = save_tiny_model("qwen2", self.folder / f"model{self.strategy().get_rank()}")
        strategy, _, _ = self.rollout(actor=False, pretrain=folder)
        stranger = strategy.prepare(tiny_model("qwen2", intermediate_size=96))
        with refused(WeightSyncError, saying=["gate_proj"]):
            strategy.update_engine_weights(stranger)

    @on_ranks
    def test_versions_and_rollout_counts_come_back_with_a_checkpoint(self) -> None:
        strategy, actor, _ = self.rollout()
        strategy.update_engine_weights(actor)
        strategy.gather_and_generate({"max_tokens": 4}, [[5, 6]])
        strategy.save_ckpt(actor, self.folder / "checkpoints")
        expected = strategy.gather_and_generate({"max_tokens": 4}, [[5, 6]])
        resumed, its_actor, _ = self.rollout()
        resumed.load_ckpt(its_actor, self.folder / "checkpoints")
        assert resumed.update_engine_weights(its_actor).version == 3
        again = resumed.gather_and_generate({"max_tokens": 4}, [[5, 6]], step=1)
        assert resumed.engine_host.rollout_step == 1
        assert again[0].weight_version == expected[0].weight_version + 1


def _spy(original: Any, note: Any) -> Any:
    def noted(*args: Any) -> Any:
        note()
        return original(*args)

    return noted
