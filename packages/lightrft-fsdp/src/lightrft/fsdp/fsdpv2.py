"""PyTorch FSDP2 behind LightRFT's strategy interface."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightrft.strategy import meta_init
from lightrft.strategy.checkpoint import import_by_name
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.memory import MoveReport
from lightrft.strategy.meta_init import FillPlan
from lightrft.strategy.native_strategy import NativeStrategy
from lightrft.strategy.sealed_file import Seals
from lightrft.strategy.state_source import Fragment, StateSource, TensorEntry
from lightrft.strategy.strategy_base import ModelRecord, StepResult
from lightrft.strategy.training_state import StateItem
from lightrft.strategy.weights import TensorSpec, UpdatePlan, WeightBucket

from . import checkpoints, state
from .export import export_buckets, with_dtypes
from .gradients import global_norm, widen
from .optimizer import ShardedAdamW, supported_options
from .sharding import Unit, cast_trainable, finish_sharding, make_mesh, plan_units, shard, sharded_modules
from .shards import local


class FSDPV2Strategy(NativeStrategy):
    """Parameters, gradients and optimizer states are sharded over the ranks and gathered block by block
    (``fully_shard``).

    Trainable parameters are held in fp32 and cast to ``--bf16`` or ``--fp16`` to compute; with ``--use_mp_opt`` they
    are held in 16 bits, with fp32 masters in the optimizer. Gradients are reduced in fp32, at each micro-batch, so that
    no rank ever has those of a whole model. One rank in fp32 has nothing to shard and runs the plain module.
    """

    name = "fsdp"
    implied: ClassVar[Mapping[str, Any]] = {"fsdp": True, "strategy": None}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._meshes: dict[int, DeviceMesh] = {}
        self._sharded: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[FSDPModule]]] = weakref.WeakKeyDictionary()
        self._background: weakref.WeakKeyDictionary[nn.Module, dist.ProcessGroup] = weakref.WeakKeyDictionary()

    # ---- preparing ---------------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        self._settle(model)
        return super().create_optimizer(model, **kwargs)

    def _place(self, model: nn.Module, shard_size: int) -> nn.Module:
        fill = meta_init.plan_fill(model) if meta_init.is_meta(model) else None
        trains = any(parameter.requires_grad for parameter in model.parameters())
        if self._has_nothing_to_shard(shard_size, trains):
            if fill is not None:
                meta_init.initialise(model, model, fill, self.config.seed)
                meta_init.materialise(model, self.device)
            cast_trainable(model, torch.float32)
            model.to(self.device)
        else:
            self._shard(model, shard_size, trains, fill)
        self._read_pretrained(model, fill)
        return model

    def _waits_in_forward(self, model: nn.Module) -> bool:
        return model in self._sharded and self.layout.world_size > 1

    def _has_nothing_to_shard(self, shard_size: int, trains: bool) -> bool:
        alone = shard_size == 1 and (self.layout.world_size == 1 or not trains)
        stays_here = not self.config.fsdp_cpu_offload or self.device.type == "cpu"
        return alone and stays_here and self._compute_dtype is None

    def _shard(self, model: nn.Module, shard_size: int, trains: bool, fill: FillPlan | None) -> None:
        def initialise(unit: Unit) -> None:
            if fill is not None:
                meta_init.initialise(unit.module, model, fill, self.config.seed)

        # transformers finds a model's hub names by its class name, which fully_shard changes: trace them before.
        layout = HubLayout(model)
        # In fp32 a frozen model computes in the dtype that it was loaded in.
        shard(
            model,
            self._mesh(shard_size),
            plan_units(model, mixed_mm_data=self.config.mixed_mm_data),
            trains=trains,
            param_dtype=self._compute_dtype or (torch.float32 if trains else None),
            master_dtype=self._compute_dtype if self.config.use_mp_opt else torch.float32,
            offload=self.config.fsdp_cpu_offload,
            before=initialise,
        )
        if fill is not None:
            meta_init.materialise(model, torch.device("cpu") if self.config.fsdp_cpu_offload else self.device, local)
        self._layouts[model] = with_dtypes(layout, {name: tensor.dtype for name, tensor in hub_sources(model)})
        self._sharded[model] = [weakref.ref(module) for module in sharded_modules(model)]
        finish_sharding(model)

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        """The dtype in which 16-bit runs compute; None in fp32."""
        return None if self.config.dtype_name == "float32" else getattr(torch, self.config.dtype_name)

    def _mesh(self, shard_size: int) -> DeviceMesh:
        if shard_size not in self._meshes:
            self._meshes[shard_size] = make_mesh(self.device, self.layout.world_size, shard_size)
        return self._meshes[shard_size]

    def _make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
        on_host = self._optimizer_lives_on_host
        options = supported_options(options)
        return ShardedAdamW(groups, master_weights=self.config.use_mp_opt, on_host=on_host, **options)

    @property
    def _optimizer_lives_on_host(self) -> bool:
        return self.config.adam_offload or self.config.fsdp_cpu_offload

    def _settle(self, model: nn.Module) -> None:
        """Reshard: after a forward pass without a backward pass, some modules still have gathered parameters."""
        for reference in self._sharded.get(model, ()):
            if (module := reference()) is not None:
                module.reshard()

    # ---- training ----------------------------------------------------------------------------------------------------
    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> StepResult:
        if self.record(model).at_boundary:
            self._settle(model)
        return super().optimizer_step(optimizer, model, scheduler, name, **kwargs)

    def _averaging_ranks(self, record: ModelRecord) -> int:
        return self.data_parallel_size

    def _backpropagate(self, record: ModelRecord, loss: torch.Tensor) -> None:
        # Gradients are sharded at every micro-batch, to save memory; replicas need to agree only after the last one.
        if record.shard_size != self.layout.world_size and isinstance(record.model, FSDPModule):
            record.model.set_requires_all_reduce(record.at_boundary)
        super()._backpropagate(record, loss)
        if self.config.use_mp_opt:
            widen(record.model.parameters())

    def _grad_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return global_norm(gradients, self.device)

    def _local(self, tensor: Any) -> torch.Tensor:
        return local(tensor)

    @torch.no_grad()
    def moving_average(self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Any = None) -> None:
        self._settle(model)
        self._settle(model_ema)
        if device is not None:
            self.move(model_ema, device)
        target = dict(hub_sources(model_ema))
        for name, value in hub_sources(model):
            rows, average = local(value), local(target[name])
            if rows.shape != average.shape:
                raise ValueError(
                    f"moving_average: {name} is sharded differently in the two models; prepare both over the same "
                    "ranks (prepare_model(ema) without shard_size)"
                )
            if average.dtype.is_floating_point:
                average.lerp_(rows.to(average.device, average.dtype), 1 - beta)
            else:
                average.copy_(rows)

    # ---- memory ------------------------------------------------------------------------------------------------------
    def move(self, target: nn.Module | Optimizer, device: torch.device | str) -> MoveReport:
        if isinstance(target, Optimizer):
            return super().move(target, device)
        begun, device = time.monotonic(), torch.device(device)
        self._settle(target)
        nbytes = sum(local(t).nbytes for _, t in hub_sources(target) if t.device.type != device.type)
        if nbytes:
            target.to(device)
            self.sync_and_clear_cache()
        return MoveReport(nbytes=nbytes, seconds=time.monotonic() - begun)

    def reload_model(self, model: nn.Module) -> MoveReport:
        if self.config.fsdp_cpu_offload and model in self._sharded:
            return MoveReport(nbytes=0, seconds=0.0)  # its shards are on the host
        return super().reload_model(model)

    def maybe_load_optimizer(self, optimizer: Optimizer, device: Any = None) -> MoveReport:
        if device is None and self._optimizer_lives_on_host:
            return MoveReport(nbytes=0, seconds=0.0)
        return super().maybe_load_optimizer(optimizer, device)

    # ---- weights and state by name -----------------------------------------------------------------------------------
    def export_weights(self, model: nn.Module, plan: UpdatePlan) -> Iterator[WeightBucket]:
        self._unfilled.require_none(model)
        self._settle(model)
        return export_buckets(model, self.hub_layout(model), plan, self.device)

    @torch.no_grad()
    def _import(
        self, model: nn.Module, specs: Mapping[str, TensorSpec], source: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        self._settle(model)
        layout = self.hub_layout(model)
        assembler = state.Assembler(model, layout)
        import_by_name(specs, source, assembler.target)
        assembler.keep_rows()
        state.clear_adapters(model, layout)
        self._renew_masters(model)

    def _renew_masters(self, model: nn.Module) -> None:
        if isinstance(optimizer := self.record(model).optimizer, ShardedAdamW):
            optimizer.renew_masters()

    def iter_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
        self._unfilled.require_none(model)
        self._settle(model)
        return state.iter_state(model, optimizer, self.device)

    def load_state(self, model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
        self._settle(model)
        state.load_state(model, optimizer, items)
        if optimizer is None:
            self._renew_masters(model)
        self._unfilled.filled(model)

    def local_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[Fragment]:
        return state.local_state(model, optimizer, self.rank, self.layout.world_size)

    def make_states(self, model: nn.Module, optimizer: Optimizer, entries: Mapping[str, TensorEntry]) -> None:
        state.make_states(model, optimizer, entries)

    def take_state(self, model: nn.Module, optimizer: Optimizer | None, source: StateSource) -> None:
        self._settle(model)
        super().take_state(model, optimizer, source)
        if optimizer is None:
            self._renew_masters(model)

    def write_state(self, record: ModelRecord, folder: Path, *, asynchronous: bool) -> Seals | Future[Seals]:
        self._unfilled.require_none(record.model)
        self._settle(record.model)
        if not asynchronous:
            return checkpoints.write(record.model, record.optimizer, folder)
        if record.model not in self._background:
            # The writers' threads of all ranks communicate during training, at the same time as those of this
            # checkpoint's other models: so each model has its own group.
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup), "a group of all ranks holds this one"
            self._background[record.model] = group
        group = self._background[record.model]
        return checkpoints.write_copies(record.model, record.optimizer, folder, record.copies, group)
