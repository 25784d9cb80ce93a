"""The strategy's side of a rollout engine: set-up, sleep and wake, weight sync, distributed generation."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .blame import describe
from .collectives import ALONE, all_gather_object
from .config import StrategyConfig
from .engine import EngineSpec, GenerationOutput, RolloutEngine
from .engine_checks import check_engine
from .errors import (
    ConfigError,
    EngineStateError,
    LightRFTError,
    PromptError,
    RankTimeoutError,
    RolloutError,
    WeightSyncError,
)
from .hub_layout import hub_models, unwrap
from .length_plot import LengthPlot
from .lifecycle import EngineStatus
from .prompts import Prompt, from_multi_modal_inputs, make_prompts, make_requests
from .registry import load_plugin
from .sampling import SamplingParams
from .weights import SyncReceipt, TensorSpec, UpdatePlan, WeightBucket, sample_positions, sync_digest, take_all_samples

if TYPE_CHECKING:
    from .strategy_base import StrategyBase

T = TypeVar("T")


class EngineHost:
    """Owns this rank's engine, if it has one, and represents it in the tensor-parallel group."""

    def __init__(self, strategy: StrategyBase) -> None:
        self.strategy = strategy
        self.engine: RolloutEngine | None = None
        self.placement = "spmd"
        self.config = strategy.config
        self.weight_version = 0
        self.rollout_step = 0
        self.last_samples: dict[str, torch.Tensor] = {}
        self.last_receipt: SyncReceipt | None = None
        self.lengths = LengthPlot(None, -1)
        self._there = False

    def state_dict(self) -> dict[str, int]:
        """Counters that a resumed run needs: they enter the samples' seeds and the outputs' versions."""
        return {"rollout_step": self.rollout_step, "weight_version": self.weight_version}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.rollout_step, self.weight_version = state["rollout_step"], state["weight_version"]

    # ---- life --------------------------------------------------------------------------------------------------------
    def setup(self, args: Any, engine_type: str, actor: nn.Module | None) -> RolloutEngine | None:
        self.strategy.setup_distributed()
        if self._there:
            raise EngineStateError("setup_inference_engine: an engine is already running; shut it down first")
        self.config = (
            self.strategy.config if args is None else StrategyConfig.from_args(args).checked(self.strategy.world_size)
        )
        cls = self.engine_class(engine_type)
        check_engine(cls.name, cls.capabilities, self.config, self.strategy.device.type)
        self.lengths = LengthPlot(self.config.log_dir, self.config.plot_every)
        self.placement = cls.placement
        spec, group = self._spec(actor, cls), self.strategy.engine_mp_group  # made by all ranks together
        problem = None
        if self.placement == "spmd" or self._is_leader():
            engine = cls()
            _, problem = _attempt(engine.start, spec, group)
            self.engine = engine if problem is None else None
        try:
            self._raise_together(problem, RolloutError, "setup_inference_engine")
        except BaseException:
            self.shutdown()
            raise
        self._there = True
        if actor is not None:
            self.update_weights(actor)
        return self.engine

    def engine_class(self, engine_type: str) -> type[RolloutEngine]:
        return load_plugin("engines", engine_type)

    def shutdown(self) -> None:
        """End the engine; another can be set up afterwards."""
        if self.engine is not None:
            self.engine.shutdown()
        self.engine, self._there, self.last_samples = None, False, {}

    @property
    def status(self) -> EngineStatus:
        return EngineStatus.SLEEPED if self.engine is None else self.engine.status().status

    def sleep(self) -> None:
        if self.engine is not None and self.config.enable_engine_sleep:
            self.sleep_engine(self.engine)
            self.strategy.sync_and_clear_cache()

    def wake(self) -> None:
        if self.engine is not None:
            self.wake_engine(self.engine)

    def sleep_engine(self, engine: Any) -> int:
        """Release the KV cache, then the weights: kept on the host at level 1, dropped at level 2. Returns bytes."""
        return engine.release("kv_cache") + engine.release("weights", keep=self.config.engine_sleep_level == 1)

    def wake_engine(self, engine: Any) -> None:
        engine.restore("weights")
        engine.restore("kv_cache")

    # ---- weights -----------------------------------------------------------------------------------------------------
    def update_weights(self, actor: nn.Module) -> SyncReceipt:
        """Restore the weights' memory, stream the buckets, compare, and only then restore the KV cache."""
        self._require("update_engine_weights")
        begun = time.monotonic()
        version = self.weight_version + 1
        specs = self.strategy.export_spec(actor)
        plan = self._agree("begin a weight update", lambda engine: self._begin(engine, version, specs))
        sent: dict[str, torch.Tensor] = {}
        receipt: SyncReceipt | None = None
        problem: Exception | None = None
        with self.strategy.waits_for_ranks("update_engine_weights"):
            # A rank whose engine refuses a bucket still takes part in gathering the others: nobody is left waiting.
            for bucket in self.strategy.export_weights(actor, plan):
                if self.engine is not None and problem is None:
                    sent |= _samples_of(bucket)
                    _, problem = _attempt(self.engine.load_bucket, bucket)
            if self.engine is not None and problem is None:
                _, problem = _attempt(self._compare, self.engine, plan, sent)
            if self.config.verify_weights == "full":
                problem = self._compare_fully(actor, plan, problem)
        # Before any engine considers its weights complete: that rank would wait in generate for one that refuses.
        self._raise_together(problem, WeightSyncError)
        if self.engine is not None:
            receipt, problem = _attempt(self.engine.finish_update)
        self._raise_together(problem, WeightSyncError)
        self.weight_version = version
        if self.engine is not None:
            self.engine.restore("kv_cache")
        self.last_receipt = self._complete(receipt, plan, sent, time.monotonic() - begun)
        self.last_samples = sent
        return self.last_receipt

    def _begin(self, engine: RolloutEngine, version: int, specs: Sequence[TensorSpec]) -> UpdatePlan:
        engine.restore("weights")
        return engine.begin_update(version, specs, bucket_bytes=int(self.config.weight_bucket_mb * 2**20))

    def _compare(self, engine: RolloutEngine, plan: UpdatePlan, sent: Mapping[str, torch.Tensor]) -> None:
        """Compare the engine's weights with those that were sent, at sampled positions."""
        if lost := [spec.name for spec in plan.specs if spec.name not in sent]:
            raise WeightSyncError(f"{len(lost)} of {len(plan.specs)} tensors were not sent: {', '.join(lost[:5])}")
        if not engine.capabilities.readback:
            return
        asked = {spec.name: sample_positions(spec.numel) for spec in plan.specs}
        mine = engine.local_positions(asked)
        held = engine.sample_weights(mine)
        for spec in plan.specs:
            values = sent[spec.name]
            if mine is not asked:  # this rank's part of the engine
                values = values[torch.isin(asked[spec.name], mine[spec.name])]
            if not _same(values, held[spec.name]):
                raise WeightSyncError(
                    f"{spec.name}: the engine's values differ from what was sent (weights version {plan.version})"
                )

    def _compare_fully(self, actor: nn.Module, plan: UpdatePlan, problem: Exception | None) -> Exception | None:
        """Gather everything once more, and compare each element with the engine's."""
        for bucket in self.strategy.export_weights(actor, plan):
            if self.engine is not None and self.engine.capabilities.readback and problem is None:
                _, problem = _attempt(_compare_bucket, self.engine, bucket)
        return problem

    def _complete(
        self, receipt: SyncReceipt | None, plan: UpdatePlan, sent: Mapping[str, torch.Tensor], seconds: float
    ) -> SyncReceipt:
        if receipt is not None:
            readback = self.engine is not None and self.engine.capabilities.readback
            changed = sum(
                1 for n, v in sent.items() if n not in self.last_samples or not _same(v, self.last_samples[n])
            )
            receipt = replace(
                receipt,
                tensors_changed=changed,
                seconds=seconds,
                verified=self.config.verify_weights if readback else "manifest",
                digest=sync_digest(plan.specs, sent),
            )
        shared = self._leaders(receipt) if self.placement != "spmd" else receipt
        assert shared is not None
        return shared

    # ---- generation --------------------------------------------------------------------------------------------------
    def generate(
        self,
        sampling_params: Any,
        token_ids: Sequence[Sequence[int]] | None,
        texts: Sequence[str] | None,
        images: Sequence[Any] | None,
        images_num: Sequence[int] | None,
        *,
        sleep_engine: bool,
        prompt_indices: Sequence[int] | None,
        step: int | None,
    ) -> list[GenerationOutput]:
        self._require("gather_and_generate")
        prompts, sampling, problem = self._read_prompts(
            sampling_params, token_ids, texts, images, images_num, prompt_indices
        )
        # One small collective has the counts and any rank's refusal, so that all ranks continue or none.
        layout = self.strategy.layout
        shared = _fingerprint(prompts) if layout.sp_size > 1 else ""
        with self.strategy.waits_for_ranks("gather_and_generate"):
            refusal = None if problem is None else describe(problem)
            told = self.strategy.all_gather_object((len(prompts), shared, refusal))
        if problem is not None:
            raise problem
        for rank, (_, _, text) in enumerate(told):
            if text is not None:
                raise PromptError.echo(f"rank {rank}: {text}")
        for group in layout.sequence_groups if layout.sp_size > 1 else ():
            if len({told[rank][:2] for rank in group}) > 1:
                raise ValueError(
                    f"gather_and_generate: ranks {', '.join(map(str, group))} share their sequences (--sp_size "
                    f"{layout.sp_size}) but got different prompts; shard the data by strategy.data_parallel_rank"
                )
        if prompt_indices is None:
            data_rank = layout.data_parallel_rank(self.strategy.rank)
            offset = sum(count for count, _, _ in told[:: layout.sp_size][:data_rank])
            prompts = [replace(prompt, index=offset + i) for i, prompt in enumerate(prompts)]
        if step is None:
            step, self.rollout_step = self.rollout_step, self.rollout_step + 1
        self.wake()
        # Ranks that share a sequence share the work: each generates for some of the prompts, and all get all outputs.
        place, size = self.strategy.rank % layout.sp_size, layout.sp_size
        outputs = self._generate_in_group(prompts[place::size], sampling, step)
        if sleep_engine:
            self.sleep()
        self._record_lengths(outputs, step)
        return outputs if size == 1 else self._share_in_sequence(outputs, len(prompts), sampling.n)

    def _share_in_sequence(self, outputs: list[GenerationOutput], prompts: int, n: int) -> list[GenerationOutput]:
        """The outputs for all prompts of a sequence group, in their order, from the parts that its ranks generated."""
        with self.strategy.waits_for_ranks("share outputs"):
            parts = [iter(part) for part in all_gather_object(outputs, self.strategy.sequence_group)]
        return [next(parts[prompt % len(parts)]) for prompt in range(prompts) for _ in range(n)]

    def generate_local(self, sampling_params: Any, token_ids: Any, multi_modal_inputs: Any) -> list[GenerationOutput]:
        self._require("engine_generate_local")
        if self.engine is None:
            raise EngineStateError(
                f"engine_generate_local: rank {self.strategy.rank} has no engine; the first rank of its group has"
            )
        images = None
        texts = None
        if multi_modal_inputs is not None:
            texts, images = from_multi_modal_inputs(multi_modal_inputs)
        elif token_ids and isinstance(token_ids[0], int):
            token_ids = [token_ids]
        prompts = make_prompts(token_ids, texts, images, None)
        prompts = [replace(prompt, index=i) for i, prompt in enumerate(prompts)]
        self.wake()
        step, self.rollout_step = self.rollout_step, self.rollout_step + 1
        sampling = SamplingParams.coerce(sampling_params)
        return self._run(self.engine, prompts, sampling, step)

    def _read_prompts(
        self,
        sampling_params: Any,
        token_ids: Sequence[Sequence[int]] | None,
        texts: Sequence[str] | None,
        images: Sequence[Any] | None,
        images_num: Sequence[int] | None,
        indices: Sequence[int] | None,
    ) -> tuple[list[Prompt], SamplingParams, Exception | None]:
        try:
            sampling = SamplingParams.coerce(sampling_params)
            prompts = make_prompts(token_ids, texts, images, images_num)
            if indices is not None:
                if len(indices) != len(prompts):
                    raise ValueError(f"prompt_indices: {len(indices)} given for {len(prompts)} prompts")
                prompts = [replace(p, index=int(i)) for p, i in zip(prompts, indices, strict=True)]
            limit = self.config.limit_mm_image_per_prompt
            if limit >= 0 and (many := [p for p in prompts if len(p.images) > limit]):
                raise ValueError(f"a prompt has {len(many[0].images)} images, --limit_mm_image_per_prompt is {limit}")
            return prompts, sampling, None
        except (ValueError, TypeError) as error:
            return [], SamplingParams(), error

    def _generate_in_group(self, prompts: list[Prompt], sampling: SamplingParams, step: int) -> list[GenerationOutput]:
        """Send prompts to the rank that needs them, and outputs back to the rank of the prompts."""
        group, size = self.strategy.groups.engine, self.strategy.layout.engine_tp_size
        if size == 1:
            assert self.engine is not None
            outputs, problem = _attempt(self._run, self.engine, prompts, sampling, step)
            self._raise_together(problem, RolloutError)
            return outputs or []
        leader = self.strategy.layout.engine_leader(self.strategy.rank)
        place = self.strategy.rank - leader
        with self.strategy.waits_for_ranks("gather prompts"):
            shares: list[Any] = [None] * size
            dist.gather_object(prompts, shares if place == 0 else None, dst=leader, group=group)
            if self.placement == "spmd":  # the engine's ranks must see identical prompts
                dist.broadcast_object_list(shares, src=leader, group=group)
        answers, problem = None, None
        if self.engine is not None:
            everyone = [prompt for share in shares for prompt in share]
            answers, problem = _attempt(self._run, self.engine, everyone, sampling, step)
        self._raise_together(problem, RolloutError)
        outputs = answers or []
        if self.placement == "spmd":
            starts = [sum(len(share) for share in shares[:i]) * sampling.n for i in range(size + 1)]
            return outputs[starts[place] : starts[place + 1]]
        return self._scatter(outputs, shares, sampling.n, leader, place, group)

    def _scatter(
        self, outputs: list[GenerationOutput], shares: list[Any], n: int, leader: int, place: int, group: Any
    ) -> list[GenerationOutput]:
        parts: list[Any] = []
        if place == 0:
            stream = iter(outputs)
            parts = [[next(stream) for _ in range(len(share) * n)] for share in shares]
        mine: list[Any] = [None]
        with self.strategy.waits_for_ranks("scatter outputs"):
            dist.scatter_object_list(mine, parts if place == 0 else None, src=leader, group=group)
        return mine[0]

    def _run(
        self, engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingParams, step: int
    ) -> list[GenerationOutput]:
        requests = make_requests(prompts, sampling, self.config.seed, step)
        return engine.generate(requests, timeout=self.config.engine_timeout) if requests else []

    def _record_lengths(self, outputs: Iterable[GenerationOutput], step: int) -> None:
        if self.lengths.active:
            everyone = self.strategy.all_gather_object([len(output.output_token_ids) for output in outputs])
            self.lengths.record([n for part in everyone for n in part], step, write=self.strategy.is_rank_0())

    # ---- agreement ---------------------------------------------------------------------------------------------------
    def _agree(self, what: str, act: Callable[[RolloutEngine], Any]) -> Any:
        """Run ``act`` on ranks with an engine; all ranks get their leader's result, or all raise."""
        result, problem = _attempt(act, self.engine) if self.engine is not None else (None, None)
        self._raise_together(problem, WeightSyncError, what)
        if self.placement != "spmd":
            result = self._leaders(result)
        return result

    def _leaders(self, value: T) -> T:
        """The value that the leader of this rank's engine has."""
        alone = self.strategy.layout.engine_tp_size == 1
        return all_gather_object(value, ALONE if alone else self.strategy.groups.engine)[0]

    def _raise_together(
        self, problem: Exception | None, kind: type[LightRFTError], what: str = "agree on the outcome"
    ) -> None:
        """Raise on all ranks if one has a problem: that one its own error, the others one that names it.

        A rank with a problem does not wait for others, which may be stuck inside the engine, waiting for it.
        """
        try:
            with self.strategy.together(what, kind):
                if problem is not None:
                    raise problem
        except RankTimeoutError:
            raise
        except Exception:
            if self.engine is not None and kind is WeightSyncError:
                with contextlib.suppress(LightRFTError):  # a broken engine raises again; the first error has the cause
                    self.engine.abort_update()
            raise

    def _require(self, what: str) -> None:
        self.strategy.setup_distributed()
        if not self._there:
            call = "strategy.setup_inference_engine(args, engine_type=args.engine_type)"
            raise EngineStateError(f"{what}: no engine is set up; call {call} first")

    def _is_leader(self) -> bool:
        return self.strategy.layout.engine_leader(self.strategy.rank) == self.strategy.rank

    def _spec(self, actor: nn.Module | None, cls: type[RolloutEngine]) -> EngineSpec:
        config = self.config
        inner = hub_models(unwrap(actor)) if actor is not None else []
        if cls.capabilities.needs_model and config.pretrain is None and not inner:
            raise ConfigError(
                ["--pretrain: not given, and no actor to take the model from; give a folder or a hub name"]
            )
        return EngineSpec.of(
            config,
            self.strategy.device,
            pretrain=config.pretrain,
            model_config=inner[0][1].config if inner and config.pretrain is None else None,
            max_model_len=config.max_model_len,
            max_images=None if config.limit_mm_image_per_prompt < 0 else config.limit_mm_image_per_prompt,
            extra=config.get_extra_arg("engine_extra", {}),
        )


def _samples_of(bucket: WeightBucket) -> dict[str, torch.Tensor]:
    return take_all_samples(bucket.tensors, {n: sample_positions(t.numel()) for n, t in bucket.tensors.items()})


def _attempt(act: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
    """(result, None) or (None, error): a rank keeps its error until all ranks can raise together."""
    try:
        return act(*args), None
    except Exception as error:  # noqa: BLE001 - raised again once every rank knows of it
        return None, error


def _compare_bucket(engine: RolloutEngine, bucket: WeightBucket) -> None:
    mine = engine.local_positions({name: torch.arange(tensor.numel()) for name, tensor in bucket.tensors.items()})
    held = engine.sample_weights(mine)
    for name, tensor in bucket.tensors.items():
        if not _same(tensor.reshape(-1).cpu()[mine[name]], held[name]):
            raise WeightSyncError(f"{name}: the engine's values differ from the trainer's")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality: NaN equals NaN, so that NaN weights are not reported as a lost tensor."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Equal on two ranks only if they have the same prompts."""
    named = repr([(prompt.prompt_token_ids, prompt.prompt, len(prompt.images), prompt.index) for prompt in prompts])
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
