"""DeepSpeed ZeRO behind the strategy interface."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy import checkpoint, plain_state
from lightrft.strategy.backend_strategy import BackendStrategy
from lightrft.strategy.errors import NotBuiltError
from lightrft.strategy.hub_layout import HubLayout, hub_sources, unwrap
from lightrft.strategy.memory import MoveReport
from lightrft.strategy.optimizers import move_optimizer
from lightrft.strategy.strategy_base import ModelRecord
from lightrft.strategy.training_state import StateItem
from lightrft.strategy.weights import UpdatePlan, WeightBucket

from . import parameters
from .deferred_engine import DeferredEngine
from .ds_config import get_ds_eval_config, get_ds_train_config
from .environment import join_process_group, load_deepspeed


class DeepspeedStrategy(BackendStrategy):
    """Trains with ZeRO stage 1, 2 or 3 (``--zero_stage``)."""

    name = "deepspeed"
    implied: ClassVar[Mapping[str, Any]] = {"fsdp": False, "strategy": None}

    def setup_distributed(self, timeout: timedelta | float | None = None) -> None:
        if self._set_up:
            return
        self.join_ranks(timeout)
        join_process_group()

    # ---- preparing ---------------------------------------------------------------------------------------------------
    def record(self, model: nn.Module) -> ModelRecord:
        return super().record(unwrap(model))

    def _axes(self, parameter: nn.Parameter) -> int:
        return len(parameters.whole_shape(parameter))

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
        wrapper = record.model if prepared else DeferredEngine(model, self.waits_for_ranks)
        assert isinstance(wrapper, DeferredEngine)
        record.model = wrapper
        if record.optimizer is not None:
            if wrapper.optimizer is not record.optimizer:
                self._bind_training(wrapper, record.optimizer)
        elif not prepared:
            record.shard_size = shard_size
            if self.config.zero_stage == 3:
                config = get_ds_eval_config(self.config)
                wrapper.bind(self._initialize(wrapper.module, None, config, shard_size), None)
            else:
                self._place(wrapper.module)
        return wrapper

    def _place(self, module: nn.Module) -> None:
        """Stages 1 and 2 keep parameters whole: put them where they compute, in the dtype of the forward pass."""
        dtype = getattr(torch, self.config.dtype_name)
        module.to(self.device)
        if not any(p.requires_grad for p in module.parameters()):
            module.to(dtype)

    def _bind_training(self, wrapper: DeferredEngine, optimizer: Optimizer | None) -> None:
        """Replace what ``prepare`` bound by an engine that trains with ``optimizer``."""
        if wrapper.engine is not None:
            wrapper.engine.destroy()
            wrapper.bind(None, None)
        config, ranks = get_ds_train_config(self.config), self.layout.world_size
        wrapper.bind(self._initialize(wrapper.module, optimizer, config, ranks), optimizer)
        self.record(wrapper).shard_size = ranks

    def _initialize(
        self, module: nn.Module, optimizer: Optimizer | None, config: dict[str, Any], shard_size: int
    ) -> Any:
        mpu = None if shard_size == self.layout.world_size else _ShardGroup(self.layout.shard_groups(shard_size))
        with self.waits_for_ranks("deepspeed.initialize"):
            engine, *_ = load_deepspeed().initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False, mpu=mpu
            )
        return engine

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
        return self.layout.world_size

    def _backpropagate(self, record: ModelRecord, loss: torch.Tensor) -> None:
        _engine(record).backward(loss, scale_wrt_gas=False)

    def _step(self, record: ModelRecord) -> tuple[bool, float]:
        engine = _engine(record)
        engine.step()
        return engine.was_step_applied(), float(engine.get_global_grad_norm())

    def _zero(self, model: nn.Module) -> Any:
        """The ZeRO optimizer of a trained model, None for others."""
        wrapper = self.record(model).model
        if not isinstance(wrapper, DeferredEngine) or wrapper.optimizer is None:
            return None
        return wrapper.engine.optimizer

    # ---- models ------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        """Build models within it. With ``meta_init`` each parameter is sharded as soon as it is made (stage 3).

        :raises NotBuiltError: ``meta_init`` under stage 1 or 2, which keep parameters whole.
        """
        self.setup_distributed()
        if not meta_init:
            yield
            return
        if self.config.zero_stage != 3:
            raise NotBuiltError(
                f"--meta_init with --zero_stage {self.config.zero_stage}: parameters stay whole on every rank; "
                "use --zero_stage 3, or --fsdp"
            )
        dtype = getattr(torch, self.config.dtype_name)
        with load_deepspeed().zero.Init(config_dict_or_path=get_ds_eval_config(self.config), dtype=dtype):
            yield

    @torch.no_grad()
    def moving_average(self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Any = None) -> None:
        target = dict(hub_sources(model_ema))
        for name, value in hub_sources(model):
            average = target[name]
            sharded = [tensor for tensor in (value, average) if parameters.is_sharded(tensor)]
            with load_deepspeed().zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
                if device is not None and not parameters.is_sharded(average):
                    average.data = average.data.to(device)
                average.data.lerp_(value.detach().to(average.device, average.dtype), 1 - beta)

    def move(self, target: nn.Module | Optimizer, device: torch.device | str) -> MoveReport:
        begun, device = time.monotonic(), torch.device(device)
        if isinstance(target, Optimizer):
            nbytes = 0 if self.config.adam_offload else move_optimizer(target, device, pin=self.device.type != "cpu")
        else:
            nbytes = 0
            for _, tensor in hub_sources(target):
                held: torch.Tensor = getattr(tensor, "ds_tensor", tensor)
                if held.device.type != device.type:
                    nbytes += held.nbytes
                    held.data = held.data.to(device)
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
        return parameters.export_buckets(model, self.hub_layout(model), plan)

    @torch.no_grad()
    def import_weights(self, model: nn.Module, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        layout, tensors = self.hub_layout(model), dict(hub_sources(model))
        waiting: dict[str, torch.Tensor] = {}

        def whole(name: str) -> torch.Tensor:
            hub = layout.by_name[name]
            if hub.source not in waiting:
                shape, dtype = parameters.whole_shape(tensors[hub.source]), tensors[hub.source].dtype
                waiting[hub.source] = torch.empty(shape, dtype=dtype, device=self.device)
            return hub.view(waiting[hub.source])

        checkpoint.import_by_name({spec.name: spec for spec in layout.specs}, source, whole)
        items = (StateItem(name=name, weight=value) for name, value in waiting.items())
        parameters.load_state(model, self._zero(model), items, with_optimizer=False)

    def iter_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
        return parameters.iter_state(model, self._zero(model) if optimizer is not None else None)

    def load_state(self, model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
        parameters.load_state(model, self._zero(model), items, with_optimizer=optimizer is not None)

    def write_state(self, record: ModelRecord, folder: Path, *, asynchronous: bool) -> Any:
        return plain_state.write(self, record, folder, asynchronous=asynchronous)

    def read_state(self, record: ModelRecord, folder: Path, *, optimizer: bool) -> None:
        plain_state.read(self, record, folder, optimizer=optimizer)


def _engine(record: ModelRecord) -> Any:
    assert isinstance(record.model, DeferredEngine), "only a prepared model trains"
    return record.model.engine


class _ShardGroup:
    """The part of a Megatron-style ``mpu`` that DeepSpeed asks for: shards live within neighbouring ranks."""

    def __init__(self, groups: tuple[tuple[int, ...], ...]) -> None:
        self._group: Any = dist.new_subgroups_by_enumeration([list(group) for group in groups])[0]
        self._size = len(groups[0])

    def get_data_parallel_group(self) -> Any:
        return self._group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        return self._size

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> Any:
        return None
