"""DeepSpeed ZeRO behind the strategy interface."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy import checkpoint, plain_state
from lightrft.strategy.errors import NotBuiltError
from lightrft.strategy.hub_layout import HubLayout, hub_sources, unwrap
from lightrft.strategy.memory import MoveReport
from lightrft.strategy.optimizers import decay_groups, move_optimizer
from lightrft.strategy.strategy_base import ModelRecord, StepResult, StrategyBase, logger
from lightrft.strategy.training_state import StateItem
from lightrft.strategy.weights import UpdatePlan, WeightBucket

from . import parameters
from .deferred_engine import DeferredEngine
from .ds_config import get_ds_eval_config, get_ds_train_config
from .environment import join_process_group, load_deepspeed


class DeepspeedStrategy(StrategyBase):
    """Trains with ZeRO stage 1, 2 or 3 (``--zero_stage``)."""

    name = "deepspeed"
    implied: ClassVar[Mapping[str, Any]] = {"fsdp": False, "strategy": None}

    def setup_distributed(self, timeout: timedelta | float | None = None) -> None:
        if self._set_up:
            return
        self.join_ranks(timeout)
        join_process_group()

    # ---- preparing ---------------------------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        self.setup_distributed()
        critic = getattr(unwrap(model), "is_critic", False)
        options = {
            "lr": self.config.critic_learning_rate if critic else self.config.actor_learning_rate,
            "betas": self.config.adam_betas,
            "eps": self.config.adam_eps,
            "weight_decay": self.config.l2,
            **kwargs,
        }
        named = unwrap(model).named_parameters()
        groups = decay_groups(named, options.pop("weight_decay"), ndim=lambda p: len(parameters.whole_shape(p)))
        if not groups:
            raise ValueError("create_optimizer: the model has no trainable parameter; set requires_grad on some")
        optimizer = torch.optim.AdamW(groups, **{"fused": True, **options})
        self.record(model).optimizer = optimizer
        if isinstance(model, DeferredEngine):
            self._bind_training(model, optimizer)
        return optimizer

    def prepare(self, *models: Any, is_rlhf: bool = False, trainable: Sequence[nn.Module] | None = None) -> Any:
        self.setup_distributed()
        for item in models:
            model = item[0] if isinstance(item, tuple) else item
            if trainable is not None and model is not None and not any(model is other for other in trainable):
                model.requires_grad_(False).eval()
        prepared = tuple(self._prepare_item(item) for item in models)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(self, model: nn.Module, shard_size: int | None = None, is_training: bool = False) -> nn.Module:
        self.setup_distributed()
        if not is_training:
            model.requires_grad_(False).eval()
        return self._prepare(model, self.layout.shard_size(shard_size), None)

    def _prepare_item(self, item: Any) -> Any:
        if not isinstance(item, tuple):
            return None if item is None else self._prepare(item, self.layout.world_size, None)
        model, optimizer, scheduler = (*item, None, None)[:3]
        if model is None:
            return item
        record = self.record(model)
        record.scheduler = scheduler if scheduler is not None else record.scheduler
        return (self._prepare(model, self.layout.world_size, optimizer), *item[1:])

    def _prepare(self, model: nn.Module, shard_size: int, optimizer: Optimizer | None) -> nn.Module:
        if isinstance(model, DeferredEngine):
            return model
        record = self.record(model)
        optimizer = optimizer if optimizer is not None else record.optimizer
        record.optimizer, record.shard_size = optimizer, shard_size
        known = {id(parameter) for parameter in model.parameters()}
        for group in optimizer.param_groups if optimizer is not None else ():
            if any(id(parameter) not in known for parameter in group["params"]):
                raise ValueError("prepare: the optimizer holds a parameter of another model; give each model its own")
        wrapper = record.model = DeferredEngine(model, self.waits_for_ranks)
        if optimizer is not None:
            self._bind_training(wrapper, optimizer)
        elif self.config.zero_stage == 3:
            wrapper.bind(self._initialize(wrapper.module, None, get_ds_eval_config(self.config), shard_size))
        else:
            self._place(wrapper.module)
        return wrapper

    def _place(self, module: nn.Module) -> None:
        """Stages 1 and 2 keep parameters whole: put them where they compute, in the dtype of the forward pass."""
        dtype = getattr(torch, self.config.dtype_name)
        module.to(self.device)
        if not any(p.requires_grad for p in module.parameters()):
            module.to(dtype)

    def _bind_training(self, wrapper: DeferredEngine, optimizer: Optimizer) -> None:
        """Replace what ``prepare`` bound by an engine that trains."""
        if wrapper.engine is not None:
            wrapper.engine.destroy()
            wrapper.bind(None)
        config = get_ds_train_config(self.config)
        wrapper.bind(self._initialize(wrapper.module, optimizer, config, self.layout.world_size))

    def _initialize(
        self, module: nn.Module, optimizer: Optimizer | None, config: dict[str, Any], shard_size: int
    ) -> Any:
        mpu = None if shard_size == self.layout.world_size else _ShardGroup(self.layout.shard_groups(shard_size))
        with self.waits_for_ranks("deepspeed.initialize"):
            engine, *_ = load_deepspeed().initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False, mpu=mpu
            )
        return engine

    def record(self, model: nn.Module) -> ModelRecord:
        return super().record(unwrap(model))

    # ---- training ----------------------------------------------------------------------------------------------------
    def backward(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scale: float | torch.Tensor | None = None,
        boundary: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise TypeError(f"backward: unknown argument {', '.join(kwargs)}; it would be ignored")
        engine, record = self._training_engine(model, "backward"), self.record(model)
        record.micro_steps += 1
        record.at_boundary = record.micro_steps % self.accumulated_gradient == 0 if boundary is None else boundary
        # DeepSpeed averages over ranks; a share of a global mean is summed instead.
        share = 1 / self.accumulated_gradient if scale is None else scale * self.data_parallel_size
        with self.waits_for_ranks("backward"):
            engine.backward(loss * share, scale_wrt_gas=False)

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> StepResult:
        if kwargs:
            raise TypeError(f"optimizer_step: unknown argument {', '.join(kwargs)}; it would be ignored")
        engine, record = self._training_engine(model, "optimizer_step"), self.record(model)
        record.scheduler = scheduler if scheduler is not None else record.scheduler
        if not record.at_boundary:
            return StepResult(stepped=False)
        record.at_boundary, record.micro_steps = False, 0
        with self.waits_for_ranks("optimizer_step"):
            engine.step()
        stepped, norm = engine.was_step_applied(), float(engine.get_global_grad_norm())
        if not stepped:
            record.skipped_steps += 1
            logger.warning(
                "%s: gradient norm is %s, step skipped on all ranks (%d so far)", name, norm, record.skipped_steps
            )
        elif scheduler is not None:
            scheduler.step()
        return StepResult(stepped=stepped, skipped=not stepped, grad_norm=norm)

    def _training_engine(self, model: nn.Module, what: str) -> Any:
        if not isinstance(model, DeferredEngine) or self._zero(model) is None:
            raise ValueError(
                f"{what}: this model has no training engine; use what prepare() returned, after create_optimizer(model)"
            )
        return model.engine

    def _zero(self, model: nn.Module) -> Any:
        """The ZeRO optimizer of a trained model, None for others."""
        if not isinstance(model, DeferredEngine) or model.engine is None or self.record(model).optimizer is None:
            return None
        return model.engine.optimizer

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

    def save_ckpt(self, model: nn.Module | Mapping[str, nn.Module], save_dir: str | Path, **kwargs: Any) -> None:
        checkpoint.save(self, model, Path(save_dir), **kwargs)

    def load_ckpt(self, model: nn.Module | Mapping[str, nn.Module], load_dir: str | Path, **kwargs: Any) -> Any:
        return checkpoint.load(self, model, Path(load_dir), **kwargs)

    def write_state(self, record: ModelRecord, folder: Path, *, asynchronous: bool) -> Any:
        return plain_state.write(self, record, folder, asynchronous=asynchronous)

    def read_state(self, record: ModelRecord, folder: Path, *, optimizer: bool) -> None:
        plain_state.read(self, record, folder, optimizer=optimizer)


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
