"""DeepSpeed ZeRO behind the strategy interface."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy import checkpoint, meta_init
from lightrft.strategy.backend_strategy import BackendStrategy
from lightrft.strategy.hub_layout import HubLayout, hub_sources, unwrap
from lightrft.strategy.memory import MoveReport
from lightrft.strategy.state_source import Fragment, StateFormat, StateSource, TensorEntry
from lightrft.strategy.strategy_base import ModelRecord, logger
from lightrft.strategy.training_state import StateItem
from lightrft.strategy.weights import TensorSpec, UpdatePlan, WeightBucket

from . import parameters, residence
from .adam import make_adamw
from .deferred_engine import DeferredEngine
from .ds_config import boundary_is_told, get_ds_eval_config, get_ds_train_config
from .environment import join_process_group, load_deepspeed, make_secondary_group, require_dtype
from .native_files import NATIVE
from .sharding import ShardGroup, cast, forget_backward_hooks, hold_root_weakly, shard_unfilled


class DeepspeedStrategy(BackendStrategy):
    """Trains with ZeRO stage 1, 2 or 3 (``--zero_stage``)."""

    name = "deepspeed"
    implied: ClassVar[Mapping[str, Any]] = {"fsdp": False, "strategy": None}
    state_formats: ClassVar[tuple[StateFormat, ...]] = (NATIVE,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shard_groups: dict[int, ShardGroup] = {}
        self._averages: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def setup_distributed(self, timeout: timedelta | float | None = None) -> None:
        if self._set_up:
            return
        require_dtype(self.config.dtype_name)
        self.join_ranks(timeout)
        join_process_group()

    # ---- preparing ---------------------------------------------------------------------------------------------------
    def record(self, model: nn.Module) -> ModelRecord:
        return super().record(unwrap(model))

    def _axes(self, parameter: nn.Parameter) -> int:
        return len(parameters.whole_shape(parameter))

    def _make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
        def say(line: str) -> None:
            if self.is_rank_0():
                logger.warning(line)

        return make_adamw(groups, options, on_host=self.config.adam_offload, say=say)

    def _optimizer_made(self, record: ModelRecord) -> None:
        if isinstance(record.model, DeferredEngine):
            self._bind_training(record.model, record.optimizer)

    def _prepare(self, model: nn.Module, shard_size: int) -> nn.Module:
        record = self.record(model)
        known = {id(parameter) for parameter in model.parameters()}
        for group in record.optimizer.param_groups if record.optimizer is not None else ():
            if any(id(parameter) not in known for parameter in group["params"]):
                raise ValueError("prepare: the optimizer holds a parameter of another model; give each model its own")
        prepared = isinstance(record.model, DeferredEngine)
        if not prepared:
            self._fill(model, shard_size)
        wrapper = record.model if prepared else DeferredEngine(model, self.waits_for_ranks)
        assert isinstance(wrapper, DeferredEngine)
        record.model = wrapper
        if record.optimizer is not None:
            if wrapper.optimizer is not record.optimizer:
                self._bind_training(wrapper, record.optimizer)
        elif not prepared:
            record.shard_size = shard_size
            if self.config.zero_stage == 3:
                config = self._eval_config(model)
                wrapper.bind(self._initialize(wrapper.module, None, config, shard_size), None)
        return wrapper

    def _fill(self, model: nn.Module, shard_size: int) -> None:
        """Move a model to its device and dtype; one on the meta device is allocated and filled."""
        dtype = self._held_dtype(model)
        if self.config.zero_stage == 3:
            if not meta_init.is_meta(model):
                cast(model, dtype)
                return
            config = self._eval_config(model)
            plan = meta_init.plan_fill(model)
            self.hub_layout(model)  # traced while shapes are whole
            shard_unfilled(model, plan, config, self._shard_group(config, shard_size), dtype, self.config.seed)
            meta_init.materialise(model, self.device)
        else:
            plan = meta_init.fill_whole(model, self.device, self.config.seed)
            cast(model, dtype)
        self._read_pretrained(model, plan)

    def _held_dtype(self, model: nn.Module) -> torch.dtype | None:
        """The dtype of parameters; None leaves them: in fp32 a frozen model computes in the dtype that it was loaded
        in."""
        if model in self._averages:
            return torch.float32
        trains = any(parameter.requires_grad for parameter in model.parameters())
        return None if self.config.dtype_name == "float32" and not trains else getattr(torch, self.config.dtype_name)

    def _eval_config(self, model: nn.Module) -> dict[str, Any]:
        """DeepSpeed's configuration for a model that does not train, or does not train yet."""
        wide = dataclasses.replace(self.config, bf16=False, fp16=False)
        return get_ds_eval_config(wide if model in self._averages else self.config)

    def _bind_training(self, wrapper: DeferredEngine, optimizer: Optimizer | None) -> None:
        """Replace the engine of ``prepare`` by one that trains with ``optimizer``."""
        if wrapper.engine is not None:
            wrapper.engine.destroy()
            forget_backward_hooks(wrapper.module)
            wrapper.bind(None, None)
        config, ranks = get_ds_train_config(self.config), self.layout.world_size
        wrapper.bind(self._initialize(wrapper.module, optimizer, config, ranks), optimizer)
        self.record(wrapper).shard_size = ranks

    def _initialize(
        self, module: nn.Module, optimizer: Optimizer | None, config: dict[str, Any], shard_size: int
    ) -> Any:
        group = self._shard_group(config, shard_size)
        with self.waits_for_ranks("deepspeed.initialize"):
            engine, *_ = load_deepspeed().initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False, mpu=group
            )
        hold_root_weakly(module)
        return engine

    def _shard_group(self, config: dict[str, Any], shard_size: int) -> ShardGroup | None:
        """The ranks that share a model's shards; None for all of them."""
        if config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            make_secondary_group(self.config.zpg)
            return None  # the secondary shard replaces sharding over fewer ranks
        if shard_size == self.layout.world_size:
            return None
        if shard_size not in self._shard_groups:
            self._shard_groups[shard_size] = ShardGroup(self.layout.shard_groups(shard_size))
        return self._shard_groups[shard_size]

    # ---- training ----------------------------------------------------------------------------------------------------
    def _trained_record(self, model: nn.Module, optimizer: Optimizer, method: str) -> ModelRecord:
        record = self.record(model)
        if self._zero(model) is None:
            raise ValueError(
                f"{method}: this model has no training engine; use what prepare() returned, after "
                "create_optimizer(model)"
            )
        if optimizer is not record.optimizer:
            raise ValueError(
                f"{method}: the engine was made with another optimizer; use the one that create_optimizer(model) "
                "returned last, or that was prepared with the model"
            )
        return record

    def _averaging_ranks(self, record: ModelRecord) -> int:
        return self.data_parallel_size

    def _backpropagate(self, record: ModelRecord, loss: torch.Tensor) -> None:
        engine = _engine(record)
        if record.loss_scale.enabled:
            engine.optimizer.loss_scaler.cur_scale = record.loss_scale.value
        if boundary_is_told(self.config):
            engine.set_gradient_accumulation_boundary(record.at_boundary)
        engine.backward(loss, scale_wrt_gas=False)

    def _step(self, record: ModelRecord) -> tuple[bool, float]:
        engine = _engine(record)
        if record.optimizer is not None and not self.config.adam_offload:
            self.maybe_load_optimizer(record.optimizer)  # the step runs where the parameters are
        engine.step()
        stepped = engine.was_step_applied()
        record.loss_scale.update(finite=stepped)
        return stepped, float(engine.get_global_grad_norm())

    def _zero(self, model: nn.Module) -> Any:
        """The ZeRO optimizer of a trained model, None for others."""
        wrapper = self.record(model).model
        if not isinstance(wrapper, DeferredEngine) or wrapper.optimizer is None:
            return None
        return wrapper.engine.optimizer

    # ---- models ------------------------------------------------------------------------------------------------------
    def prepare_average(self, model: nn.Module) -> nn.Module:
        self._averages.add(unwrap(model))
        return super().prepare_average(model)

    @torch.no_grad()
    def moving_average(self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Any = None) -> None:
        target = dict(hub_sources(model_ema))
        for name, value in hub_sources(model):
            average = target[name]
            with parameters.gathered(value), parameters.gathered(average, written=True):
                if device is not None and not parameters.is_sharded(average):
                    average.data = average.data.to(device)
                fresh = value.detach().to(average.device, average.dtype)
                average.data.lerp_(fresh, 1 - beta) if fresh.is_floating_point() else average.data.copy_(fresh)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def move(self, target: nn.Module | Optimizer, device: torch.device | str) -> MoveReport:
        """Move a model's parameters, or its optimizer's moments and master weights. No collective.

        With ``--adam_offload`` the optimizer's are always on the host; the report's note says so.
        """
        begun, device = time.monotonic(), torch.device(device)
        pin = self.device.type != "cpu"
        if isinstance(target, nn.Module):
            nbytes = residence.move_parameters(target, self._zero(target), device, pin=pin)
        elif self.config.adam_offload:
            note = "with --adam_offload these states are always on the host"
            logger.info("optimizer states: %s", note)
            return MoveReport(nbytes=0, seconds=0.0, note=note)
        else:
            models = [record.model for record in self._records.values() if record.optimizer is target]
            zero = self._zero(models[0]) if models else None
            if zero is None:
                return super().move(target, device)
            nbytes = residence.move_optimizer_states(zero, device, pin=pin)
        if nbytes:
            self.sync_and_clear_cache()
        return MoveReport(nbytes=nbytes, seconds=time.monotonic() - begun)

    # ---- weights and state -------------------------------------------------------------------------------------------
    def hub_layout(self, model: nn.Module) -> HubLayout:
        module = unwrap(model)
        if module not in self._layouts:
            shapes = {name: parameters.whole_shape(tensor) for name, tensor in hub_sources(module)}
            self._layouts[module] = HubLayout(module, shapes)
        return self._layouts[module]

    def export_weights(self, model: nn.Module, plan: UpdatePlan) -> Iterator[WeightBucket]:
        self._unfilled.require_none(model)
        return parameters.export_buckets(model, self.hub_layout(model), plan)

    @torch.no_grad()
    def _import(
        self, model: nn.Module, specs: Mapping[str, TensorSpec], source: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        assembler = parameters.Assembler(model, self._zero(model), self.hub_layout(model), specs)
        checkpoint.import_by_name(specs, source, assembler.target)
        assembler.set_complete()
        parameters.clear_adapters(model, self._zero(model), self.hub_layout(model))

    def iter_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
        self._unfilled.require_none(model)
        return parameters.iter_state(model, self._zero(model) if optimizer is not None else None)

    def load_state(self, model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
        parameters.load_state(model, self._zero(model), items, with_optimizer=optimizer is not None)
        self._unfilled.filled(model)

    def take_state(self, model: nn.Module, optimizer: Optimizer | None, source: StateSource) -> None:
        super().take_state(model, optimizer, source)
        if self.config.zpg > 1:
            parameters.renew_secondary_shards(model)

    def local_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[Fragment]:
        return parameters.local_state(
            model, self._zero(model), self.rank, self.layout.world_size, with_optimizer=optimizer is not None
        )

    def state_entries(
        self, model: nn.Module, optimizer: Optimizer | None = None
    ) -> dict[str, tuple[Sequence[int], int]]:
        return parameters.state_entries(model, self._zero(model) if optimizer is not None else None)

    def make_states(self, model: nn.Module, optimizer: Optimizer, entries: Mapping[str, TensorEntry]) -> None:
        parameters.make_states(model, self._zero(model), entries)


def _engine(record: ModelRecord) -> Any:
    assert isinstance(record.model, DeferredEngine), "only a prepared model trains"
    return record.model.engine
