"""The interface of training backends, with the parts that are the same for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from . import checkpoint, collectives, fragments, plain_state
from .adapters import with_adapter
from .blame import describe, is_lost_peer
from .config import LESS_MEMORY, StrategyConfig
from .dataloader import make_dataloader
from .device import empty_cache, local_device, process_group_backend, synchronize
from .engine import RolloutEngine
from .engine_host import EngineHost
from .errors import CheckpointError, ConfigError, LightRFTError, RankTimeoutError
from .groups import ProcessGroups, RankLayout
from .host_copies import HostCopies
from .hub_export import save_hub_model
from .hub_layout import HubLayout, hub_sources, inner_prefix, unwrap
from .journal import RankJournal
from .lifecycle import EngineStatus
from .memory import MoveReport, memory_figures
from .optimizers import LossScale, move_optimizer
from .scoring import RewardEngine
from .sealed_file import Seals
from .state_formats import open_state
from .state_source import Fragment, StateFormat, StateSource, TensorEntry
from .training_state import StateItem
from .weights import SyncReceipt, TensorSpec, UpdateKind, UpdatePlan, WeightBucket, plan_buckets

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

    from .engine import GenerationOutput

logger = logging.getLogger("lightrft")
T = TypeVar("T")
# Joining takes as long as the slowest process needs to start, even if the deadline of a collective is shorter.
JOIN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What ``optimizer_step`` did.

    :param stepped: the weights moved. False between accumulation boundaries, and when the step was skipped.
    :param skipped: a boundary was reached, but the gradient norm was not finite on some rank.
    :param grad_norm: global norm before clipping; None between boundaries.
    """

    stepped: bool
    skipped: bool = False
    grad_norm: float | None = None


@dataclass(kw_only=True)
class ModelRecord:
    """What a strategy knows about one prepared model. It does not keep the model alive."""

    reference: weakref.ref[nn.Module]
    optimizer: Optimizer | None = None
    scheduler: Any = None
    shard_size: int | None = None
    micro_steps: int = 0
    at_boundary: bool = False
    skipped_steps: int = 0
    told_of_no_backward: bool = False
    loss_scale: LossScale = field(default_factory=lambda: LossScale(enabled=False))
    copies: HostCopies = field(default_factory=HostCopies)  # from which an asynchronous save writes

    @property
    def model(self) -> nn.Module:
        """What the user calls: the model itself or a backend's wrapper.

        :raises ValueError: it was a wrapper that has been garbage-collected.
        """
        model = self.reference()
        if model is None:
            raise ValueError("the prepared model no longer exists: keep what prepare() returned, and use that")
        return model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.reference = weakref.ref(model)

    def remember(self, optimizer: Optimizer | None = None, scheduler: Any = None) -> None:
        """Use these from now on; None keeps the present one."""
        self.optimizer = self.optimizer if optimizer is None else optimizer
        self.scheduler = self.scheduler if scheduler is None else scheduler


class StrategyBase(ABC):
    """One object that trains, generates and saves, with the chosen backend and engine.

    Set-up is lazy: the first call that needs ranks sets them up. Every method that communicates must be called by all
    ranks in the same order, except where its documentation says otherwise.

    :param seed: and the other keywords: any field of :class:`StrategyConfig`; they override ``args``.
    :param args: a Namespace, dict, config or object with attributes; kept unchanged as ``strategy.args``.
    :raises ConfigError: every fault of the configuration at once.
    """

    name: ClassVar[str] = ""
    # Settings that this class implies.
    implied: ClassVar[Mapping[str, Any]] = {}
    # Formats of training state that this backend's own library writes, for load_ckpt and `lightrft convert`.
    state_formats: ClassVar[tuple[StateFormat, ...]] = ()
    # False for a strategy that never talks to other ranks.
    distributed: ClassVar[bool] = True

    def __init__(
        self,
        seed: int | None = None,
        max_norm: float | None = None,
        micro_train_batch_size: int | None = None,
        train_batch_size: int | None = None,
        args: Any = None,
        **settings: Any,
    ) -> None:
        named = {
            "seed": seed,
            "max_norm": max_norm,
            "micro_train_batch_size": micro_train_batch_size,
            "train_batch_size": train_batch_size,
        }
        given = {key: value for key, value in named.items() if value is not None}
        base = StrategyConfig.from_args(args)
        known = {spec.name for spec in dataclasses.fields(base)}
        if strange := sorted(set(settings) - known):
            raise ConfigError([f"{key}={settings[key]!r}: unknown setting; see StrategyConfig" for key in strange])
        self.config = dataclasses.replace(base, **{**self.implied, **settings, **given}).checked()
        self.args = self.config if args is None else args
        self.device = local_device(self.config.local_rank)
        self.layout = RankLayout()
        self.rank = self.get_rank()
        self.groups = ProcessGroups(self.layout, 0)
        self.engine_host = EngineHost(self)
        self._set_up = False
        self._journal: RankJournal | None = None
        self._records: weakref.WeakKeyDictionary[nn.Module, ModelRecord] = weakref.WeakKeyDictionary()
        self._layouts: weakref.WeakKeyDictionary[nn.Module, HubLayout] = weakref.WeakKeyDictionary()
        self._pending_save: checkpoint.PendingSave | None = None

    # ---- the documents' seven ----------------------------------------------------------------------------------------
    @abstractmethod
    def setup_distributed(self, timeout: timedelta | float | None = None) -> None:
        """Join the other ranks: process groups, device, seeds. Repeating it does nothing.

        A backend sets up what it needs and calls :meth:`join_ranks`.

        :param timeout: deadline of every collective; seconds or a timedelta; default ``--dist_timeout``.
        """

    @abstractmethod
    def create_optimizer(self, model: nn.Module, **kwargs: Any) -> Optimizer:
        """AdamW for the model's trainable parameters; learning rate, betas and decay come from the configuration.

        The object stays valid if the model is prepared later: it is re-bound in place.

        :param kwargs: lr, betas, eps, weight_decay override the configuration.
        """

    @abstractmethod
    def prepare(self, *models: Any, is_rlhf: bool = False, trainable: Sequence[nn.Module] | None = None) -> Any:
        """Hand models to the backend: bare, or as (model, optimizer, scheduler). None passes through.

        :param is_rlhf: the models have several roles (actor, critic, reward, reference); the order is kept in any case.
        :param trainable: the ones that get an optimizer; the others are frozen. None decides by ``requires_grad``.
        :return: the prepared arguments, in the same form: one object for one argument, else a tuple.
        """

    @abstractmethod
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
        """Add a micro-batch's gradients.

        :param loss: 0-d tensor.
        :param scale: this micro-batch's share of a global mean: the gradient is the sum over ranks and micro-batches of
            ``scale * loss``. None: ``loss / accumulation steps``, averaged over ranks.
        :param boundary: whether an optimizer step follows this micro-batch; None counts the accumulation steps.
        """

    @abstractmethod
    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, name: str = "model", **kwargs: Any
    ) -> StepResult:
        """At an accumulation boundary: clip, step optimizer and scheduler, clear the gradients. Else do nothing.

        The norm is global over this model's parameters. A norm that is not finite skips the step on all ranks together.

        :param scheduler: the scheduler to step; None: none, not even one that was prepared with the model.
        :param name: the model's name in messages.
        """

    @abstractmethod
    def save_ckpt(self, model: nn.Module | Mapping[str, nn.Module], save_dir: str | Path, **kwargs: Any) -> None:
        """Write a checkpoint into ``save_dir/tag``; see :func:`lightrft.strategy.checkpoint.save` for the keywords."""

    @abstractmethod
    def load_ckpt(self, model: nn.Module | Mapping[str, nn.Module], load_dir: str | Path, **kwargs: Any) -> Any:
        """Read the newest complete checkpoint; keywords and result: :func:`lightrft.strategy.checkpoint.load`."""

    # ---- ranks -------------------------------------------------------------------------------------------------------
    def join_ranks(self, timeout: timedelta | float | None = None) -> None:
        """The part of ``setup_distributed`` that is the same for all backends. Repeating it does nothing.

        :raises ConfigError: sizes do not fit the number of ranks.
        """
        if self._set_up:
            return
        if self.config.local_rank >= 0:
            os.environ.setdefault("LOCAL_RANK", str(self.config.local_rank))  # where DeepSpeed and vLLM look for it
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout or self.config.dist_timeout
        if self.distributed and not dist.is_initialized():
            self._init_process_group(timedelta(seconds=max(seconds, JOIN_SECONDS)))
        world_size = dist.get_world_size() if self.distributed else 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.config = self.config.checked(world_size)
        self.layout = RankLayout(
            world_size=world_size, engine_tp_size=self.config.engine_tp_size, sp_size=self.config.sp_size
        )
        self.groups = ProcessGroups(self.layout, self.rank, timedelta(seconds=seconds))
        # No exception ends a wait for NCCL: there the journal ends the process.
        self._journal = RankJournal(self.rank, world_size, seconds, ends_process=self.device.type != "cpu")
        self._set_up = True
        self.set_seed(self.config.seed)

    def _init_process_group(self, timeout: timedelta) -> None:
        backend = process_group_backend(self.device)
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # a plain `python script.py`: a world of one, without a port
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)

    def set_seed(self, seed: int) -> None:
        """Seed python, numpy and torch, equally on all ranks: what must differ between ranks is seeded by index."""
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    @property
    def world_size(self) -> int:
        self.setup_distributed()
        return self.layout.world_size

    @property
    def data_parallel_size(self) -> int:
        """Number of data ranks: groups of ranks with different data."""
        self.setup_distributed()
        return self.layout.data_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        self.setup_distributed()
        return self.layout.data_parallel_rank(self.rank)

    @property
    def accumulated_gradient(self) -> int:
        """Micro-batches of one optimizer step on this rank."""
        return self.config.accumulation_steps(self.data_parallel_size)

    @property
    def engine_mp_group(self) -> dist.ProcessGroup | None:
        """Ranks that share an engine; None for an engine of one rank."""
        self.setup_distributed()
        return self.groups.engine

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Ranks that share each sequence (``--sp_size``) and so have the same data; None if each has its own."""
        self.setup_distributed()
        return self.groups.sequence

    def get_rank(self) -> int:
        """This process's rank; before set-up, what the launcher says it will be."""
        if not self.distributed:
            return 0
        return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))

    def is_rank_0(self) -> bool:
        """True on the rank that prints and writes; works before set-up."""
        return self.get_rank() == 0

    def print(self, *message: Any, **options: Any) -> None:
        """Print on rank 0 only, with the options of Python's print; works before set-up."""
        if self.is_rank_0():
            print(*message, **{"flush": True, **options})  # noqa: T201 - the one place that prints

    @contextlib.contextmanager
    def waits_for_ranks(self, operation: str) -> Iterator[None]:
        """Wrap a wait for other ranks: if it fails, the error names the late rank, its operation and line.

        :raises RankTimeoutError: a rank died or did not come within the deadline.
        """
        self.setup_distributed()
        assert self._journal is not None
        try:
            with self._journal.operation(operation):
                yield
        except torch.OutOfMemoryError as error:
            error.add_note(f"{operation}: flags that need less memory: {LESS_MEMORY}")
            raise

    @contextlib.contextmanager
    def together(self, operation: str, kind: type[LightRFTError] = LightRFTError) -> Iterator[None]:
        """Wrap work that all ranks do: if one raises, all raise. No rank continues before all are done.

        The rank that failed raises its own error, at once; the others, as soon as they have done their part, ``kind``
        with that rank and its error. Work that communicates may be within.

        :raises RankTimeoutError: a rank died or did not come within the deadline.
        """
        with self.waits_for_ranks(operation):
            assert self._journal is not None
            try:
                yield
            except Exception as error:
                if not isinstance(error, RankTimeoutError) and not is_lost_peer(error):
                    self._journal.agree(describe(error))
                raise
            if (problem := self._journal.agree(None)) is not None:
                raise kind.echo(problem)

    def all_are_done(self, seconds: float) -> bool:
        """After :meth:`together` failed here: whether the others are done. Waits up to ``seconds`` for them."""
        return self._journal is None or self._journal.all_have_agreed(seconds)

    @property
    def _everyone(self) -> Any:
        """The group of "all ranks"."""
        return None if self.distributed else collectives.ALONE

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """Reduce tensors, numbers, or dicts of them over all ranks: "mean", "sum", "max" or "min".

        ``data`` is not changed; dtypes and 0-d shapes are kept; Python numbers are returned for Python numbers.
        """
        with self.waits_for_ranks("all_reduce"):
            return collectives.all_reduce(data, op, self._everyone)

    def all_gather(self, data: Any) -> Any:
        """Gather from all ranks in rank order: tensors along axis 0 (lengths may differ), numbers as a list."""
        with self.waits_for_ranks("all_gather"):
            return collectives.all_gather(data, self._everyone)

    def all_gather_object(self, data: Any) -> list[Any]:
        """Any picklable object from each rank, in rank order."""
        with self.waits_for_ranks("all_gather_object"):
            return collectives.all_gather_object(data, self._everyone)

    def reduce_over_data(self, data: Any, op: str = "mean") -> Any:
        """:meth:`all_reduce` in which the data of ranks that share their sequences count once."""
        with self.waits_for_ranks("reduce_over_data"):
            return collectives.all_reduce(data, op, self._data_ranks)

    def gather_over_data(self, data: Any) -> Any:
        """:meth:`all_gather` from one rank of each sequence group, in the order of their data ranks; a list or a tuple
        is returned as a list with one entry per data rank.
        """
        with self.waits_for_ranks("gather_over_data"):
            return collectives.all_gather(data, self._data_ranks)

    def once_a_sequence(self, act: Callable[[], T], kind: type[LightRFTError] = LightRFTError) -> T:
        """Call ``act`` on one rank of each sequence group. All ranks of the group get its result, or raise: that rank
        its own error, the others ``kind``.

        For work that is expensive or not deterministic, such as grading responses.
        """
        if self.sequence_group is None:
            return act()
        result, problem = None, None
        if self.rank % self.layout.sp_size == 0:
            try:
                result = act()
            except Exception as error:  # noqa: BLE001 - raised again once the group's other ranks know of it
                problem = error
        told = None if problem is None else describe(problem)
        with self.waits_for_ranks("once_a_sequence"):
            shared, text = collectives.all_gather_object((result, told), self.sequence_group)[0]
        if problem is not None:
            raise problem
        if text is not None:
            raise kind.echo(f"rank {self.rank - self.rank % self.layout.sp_size}: {text}")
        return shared

    @property
    def _data_ranks(self) -> Any:
        """The group of "all data": this rank and the one at the same place in each other sequence group."""
        return collectives.ALONE if self.data_parallel_size == 1 else self.groups.data

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        with self.waits_for_ranks("barrier"):
            if self.layout.world_size > 1:
                dist.barrier()

    # ---- models ------------------------------------------------------------------------------------------------------
    def prepare_model(self, model: nn.Module, shard_size: int | None = None, is_training: bool = False) -> nn.Module:
        """Prepare one model, frozen unless ``is_training``, sharded over at most ``shard_size`` ranks (None: all)."""
        if not is_training:
            model.requires_grad_(False).eval()
        return self.prepare(model)

    def prepare_models_and_optimizers(
        self,
        actor: nn.Module,
        critic: nn.Module | None,
        reward_models: Any,
        initial_model: Any,
        args: Any,
        max_steps: int,
    ) -> tuple[Any, Any, Any, Any]:
        """Prepare everything that PPO needs.

        :param reward_models: a model, a list of them, or None. :param initial_model: the reference, or None.
        :param args: read for the learning rates and the schedule; None takes this strategy's configuration.
        :param max_steps: optimizer steps of the whole run, for the schedule.
        :return: (actor, optimizer, scheduler), (critic, optimizer, scheduler), reward models, reference.
        """
        from .schedules import make_scheduler

        config = self.config if args is None else StrategyConfig.from_args(args)

        def trained(model: nn.Module | None, lr: float) -> tuple[Any, Any, Any]:
            if model is None:
                return None, None, None
            model = self.prepare_model(model, is_training=True)
            optimizer = self.create_optimizer(model, lr=lr, betas=config.adam_betas, weight_decay=config.l2)
            scheduler = make_scheduler(config.lr_scheduler, optimizer, max_steps, config.lr_warmup_ratio)
            self.record(model).scheduler = scheduler
            return model, optimizer, scheduler

        def frozen(models: Any, shard_size: int | None) -> Any:
            if isinstance(models, (list, tuple)):
                return type(models)(frozen(model, shard_size) for model in models)
            return None if models is None else self.prepare_model(models, shard_size=shard_size)

        return (
            trained(actor, config.actor_learning_rate),
            trained(critic, config.critic_learning_rate),
            frozen(reward_models, 8),
            frozen(initial_model, config.initial_model_shard_size),
        )

    def record(self, model: nn.Module) -> ModelRecord:
        """The record of a model, made when it is first asked for."""
        if model not in self._records:
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"{type(model).__name__} is no model; the order is backward(loss, model, optimizer) and "
                    "optimizer_step(optimizer, model, scheduler)"
                )
            self._records[model] = ModelRecord(
                reference=weakref.ref(model), loss_scale=LossScale(enabled=self.config.fp16)
            )
        return self._records[model]

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """The user's module inside a backend's wrapper."""
        return unwrap(model)

    @contextlib.contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        """A context to build models in; with ``meta_init`` on the meta device, until ``prepare`` fills each rank's
        shard."""
        with torch.device("meta") if meta_init else contextlib.nullcontext():
            yield

    def prepare_average(self, model: nn.Module) -> nn.Module:
        """Prepare the frozen model for :meth:`moving_average`, sharded like the one that it averages.

        It is held in fp32 even if the run computes in 16 bits, where most of its updates would be rounded away.
        """
        return self.prepare_model(model.float())

    @torch.no_grad()
    def moving_average(self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Any = None) -> None:
        """``ema = beta * ema + (1 - beta) * model``, shard by shard; ``model_ema`` comes from :meth:`prepare_average`.

        :param device: to which ``model_ema`` is moved first; default: it stays where it is.
        """
        target = dict(hub_sources(model_ema))
        for name, value in hub_sources(model):
            average = target[name]
            if device is not None and average.device != torch.device(device):
                average.data = average.data.to(device)
            fresh = value.detach().to(average.device, average.dtype)
            average.lerp_(fresh, 1 - beta) if fresh.is_floating_point() else average.copy_(fresh)

    def setup_dataloader(
        self,
        replay_buffer: Any,
        batch_size: int,
        pin_memory: bool = False,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = True,
        sampler: Any = None,
        consumed_samples: int = 0,
    ) -> StatefulDataLoader[Any]:
        """A loader that shards a map-style dataset over the data ranks and can be resumed.

        :param batch_size: samples per batch on this rank.
        :param consumed_samples: samples, over all ranks, to skip at the start; later ``state_dict`` has the position.
        """
        return make_dataloader(
            replay_buffer,
            batch_size=batch_size,
            pin_memory=pin_memory and self.device.type != "cpu",
            shuffle=shuffle,
            collate_fn=collate_fn,
            drop_last=drop_last,
            sampler=sampler,
            consumed_samples=consumed_samples,
            seed=self.config.seed,
            rank=self.data_parallel_rank,
            world_size=self.data_parallel_size,
        )

    # ---- memory ------------------------------------------------------------------------------------------------------
    def move(self, target: nn.Module | Optimizer, device: torch.device | str) -> MoveReport:
        """Move a model's parameters or an optimizer's states to ``device``; returns bytes and seconds. No
        collective."""
        begun, device = time.monotonic(), torch.device(device)
        if isinstance(target, Optimizer):
            nbytes = move_optimizer(target, device, pin=self.device.type != "cpu")
        else:
            nbytes = sum(t.nbytes for _, t in hub_sources(target) if t.device.type != device.type)
            if nbytes:
                target.to(device)
        if nbytes:
            self.sync_and_clear_cache()
        return MoveReport(nbytes=nbytes, seconds=time.monotonic() - begun)

    def offload_model(self, model: nn.Module) -> MoveReport:
        """Move a model's parameters to the host, until :meth:`reload_model`. No collective."""
        return self.move(model, "cpu")

    def reload_model(self, model: nn.Module) -> MoveReport:
        """Move an offloaded model back to this rank's device, if it is not there. No collective."""
        return self.move(model, self.device)

    def maybe_offload_optimizer(self, optimizer: Optimizer) -> MoveReport:
        """Move optimizer states to the host, into pinned memory if there is an accelerator. No collective."""
        return self.move(optimizer, "cpu")

    def maybe_load_optimizer(self, optimizer: Optimizer, device: Any = None) -> MoveReport:
        """Move optimizer states back, if they were offloaded. No collective."""
        return self.move(optimizer, self.device if device is None else device)

    def report_memory(self, prefix: str = "") -> dict[str, float]:
        """Print this rank's memory in GiB (rank 0 prints) and return the figures. No collective."""
        figures = memory_figures(self.device)
        self.print(f"memory {prefix}:", ", ".join(f"{name} {value:.2f} GiB" for name, value in figures.items()))
        return figures

    def sync_and_clear_cache(self) -> None:
        """Wait for the device and free cached memory. No collective."""
        synchronize(self.device)
        empty_cache(self.device)

    # ---- weights and state by name -----------------------------------------------------------------------------------
    def hub_layout(self, model: nn.Module) -> HubLayout:
        """The model's parameters under their hub names (traced once and kept)."""
        if model not in self._layouts:
            self._layouts[model] = HubLayout(model)
        return self._layouts[model]

    def export_spec(self, model: nn.Module, kind: UpdateKind = "full") -> list[TensorSpec]:
        """Hub name, shape, dtype and atom of everything that :meth:`export_weights` sends. No collective.

        :param kind: "full": the whole model, LoRA adapters merged; "adapter": only the adapters, under peft's names.
        """
        return self.hub_layout(model).specs_of(kind)

    def export_weights(self, model: nn.Module, plan: UpdatePlan) -> Iterator[WeightBucket]:
        """Stream whole tensors in the plan's buckets and dtype. A bucket is valid until the next is asked for."""
        layout, tensors = self.hub_layout(model), dict(hub_sources(model))
        for index, specs in enumerate(plan_buckets(plan)):
            hubs = [layout.by_name[spec.name] for spec in specs]
            sources = {hub.source for hub in hubs}
            merged = {s: with_adapter(s, layout.adapters, lambda name: tensors[name].detach()) for s in sources}
            views = {hub.name: hub.view(merged[hub.source]) for hub in hubs}
            yield WeightBucket(index, {spec.name: views[spec.name].to(spec.dtype) for spec in specs})

    def import_weights(self, model: nn.Module, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy whole tensors, by hub name, into the model. LoRA adapters are reset: B becomes 0.

        :raises CheckpointError: a name or shape is not the model's, or one is missing.
        """
        layout = self.hub_layout(model)
        plain_state.import_weights(model, layout, {spec.name: spec for spec in layout.specs}, source)

    def iter_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[StateItem]:
        """Stream the training state, one unsharded parameter at a time, in module order, on every rank."""
        return plain_state.iter_state(model, optimizer)

    def load_state(self, model: nn.Module, optimizer: Optimizer | None, items: Iterable[StateItem]) -> None:
        """Load a stream that came from any backend's :meth:`iter_state`."""
        plain_state.load_state(model, optimizer, items)

    def local_state(self, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[Fragment]:
        """This rank's part of the training state, as flat ranges that share its memory. No collective.

        Sharded backends override it; the default is for modules that are whole on every rank.
        """
        return plain_state.local_state(model, optimizer, self.rank, self.layout.world_size)

    def state_entries(
        self, model: nn.Module, optimizer: Optimizer | None = None
    ) -> dict[str, tuple[Sequence[int], int]]:
        """Whole shape and optimizer steps of each parameter, by name, in module order. No collective."""
        return plain_state.state_entries(model, optimizer)

    def make_states(self, model: nn.Module, optimizer: Optimizer, entries: Mapping[str, TensorEntry]) -> None:
        """Allocate the optimizer's states that a checkpoint has, and set their steps; values follow. No collective.

        :raises CheckpointError: it has a state that this optimizer does not use.
        """
        plain_state.make_states(model, optimizer, entries)

    @torch.no_grad()
    def take_state(self, model: nn.Module, optimizer: Optimizer | None, source: StateSource) -> None:
        """Read this rank's part of a state, written by any backend on any number of ranks. Every rank must call.

        :param optimizer: None skips optimizer states.
        :raises CheckpointError: another model's or a damaged checkpoint; raised on every rank.
        """
        with self.together("load_ckpt", CheckpointError):
            shapes = {name: shape for name, (shape, _) in self.state_entries(model, optimizer).items()}
            source = source.named_as(shapes, inner_prefix(model))
            if optimizer is not None:
                self.make_states(model, optimizer, source.entries)
            for fragment in self.local_state(model, optimizer):
                if fragment.kind in source.entries[fragment.name].dtypes:
                    source.fill(fragment.values, fragment.name, fragment.kind, fragment.start)
                else:  # a parameter that has had no gradient yet
                    fragment.values.zero_()

    def write_state(self, record: ModelRecord, folder: Path, *, asynchronous: bool) -> Seals | Future[Seals] | None:
        """Write a model's weights and optimizer into ``folder``, in the backend's own format, from all ranks.

        The default is the portable form (:mod:`lightrft.strategy.fragments`).

        :param asynchronous: copy the state (``record.copies``), return, and write the copy in the background.
        :return: seals of files that this rank wrote with :class:`SealedFile`, or with ``asynchronous`` a future of
            them; other files are read again to digest them, and flushed, when the save is completed.
        """
        if self.is_rank_0():
            fragments.write_index(self.state_entries(record.model, record.optimizer), folder, self.layout.world_size)
        mine = self.local_state(record.model, record.optimizer)
        copies = record.copies if asynchronous else None
        return fragments.write(mine, folder, self.rank, self.layout.world_size, copies=copies)

    def read_state(self, record: ModelRecord, folder: Path, *, optimizer: bool) -> None:
        """Read what any backend's :meth:`write_state` wrote, at any world size, without unpickling code."""
        self.take_state(record.model, record.optimizer if optimizer else None, open_state(folder))

    def finish_checkpoint(self, *, block: bool = True) -> bool:
        """Complete an asynchronous save: digests, rename, ``latest``. True if none is pending any more."""
        return checkpoint.finish(self, block=block)

    def save_model(self, model: nn.Module, tokenizer: Any, output_dir: str | Path, **kwargs: Any) -> None:
        """Write a folder that ``from_pretrained`` loads: safetensors by hub name, configuration, tokenizer.

        Streams bucket by bucket: no rank's device ever holds the whole model. Other files of an existing folder stay.

        :param tokenizer: a tokenizer or processor, or None.
        :param kwargs: ``bucket_bytes`` (size limit of a file), ``dtype``.
        """
        save_hub_model(self, model, tokenizer, Path(output_dir), **kwargs)

    # ---- rollout -----------------------------------------------------------------------------------------------------
    def setup_inference_engine(self, args: Any, engine_type: str = "vllm", actor: nn.Module | None = None) -> Any:
        """Start a rollout engine; it is awake afterwards. Without an actor it loads ``--pretrain``.

        :param args: settings of the engine; None takes this strategy's. :param actor: sync its weights at once.
        :param engine_type: the engine, whatever ``args.engine_type`` says.
        :return: the engine (None on ranks that have none).
        """
        return self.engine_host.setup(args, engine_type, actor)

    def setup_reward_engine(self, pretrain: str, engine_type: str | None = None) -> RewardEngine:
        """Run a reward model in an engine instead of preparing it: call ``.score(sequences)`` instead of the model.

        If memory is scarce, set it up before the rollout engine: it sleeps whenever it does not score.

        :param pretrain: a folder or hub name of a sequence classifier with one output.
        :param engine_type: None takes ``--engine_type``.
        """
        self.setup_distributed()
        return RewardEngine(self, pretrain, engine_type)

    @property
    def inference_engine(self) -> RolloutEngine | None:
        return self.engine_host.engine

    @property
    def inference_engine_status(self) -> EngineStatus:
        return self.engine_host.status

    def update_engine_weights(self, actor: nn.Module) -> SyncReceipt:
        """Send the actor's weights to the engine, bucket by bucket, and verify them.

        :raises WeightSyncError: a tensor was lost, duplicated, altered or misnamed; raised on every rank.
        """
        return self.engine_host.update_weights(actor)

    def gather_and_generate(
        self,
        sampling_params: Any,
        all_prompt_token_ids: Sequence[Sequence[int]] | None = None,
        all_prompts: Sequence[str] | None = None,
        all_images: Sequence[Any] | None = None,
        images_num: Sequence[int] | None = None,
        sleep_engine: bool = True,
        *,
        prompt_indices: Sequence[int] | None = None,
        step: int | None = None,
    ) -> list[GenerationOutput]:
        """Generate for this rank's prompts; ranks may bring different numbers of them, or none.

        :param sampling_params: :class:`SamplingParams`, a dict with vLLM's names, or the engine's own object.
        :param all_prompt_token_ids: prompts as ids, or ``all_prompts`` as text; one of the two.
        :param all_images: per prompt None, an image or a list of them; or, with ``images_num``, a flat list.
        :param sleep_engine: let the engine sleep afterwards, if sleep is enabled.
        :param prompt_indices: global index of each prompt, from which its samples' seeds derive; default: its position
            over all ranks.
        :param step: counts rollouts in the seeds; default: the strategy's own counter.
        :return: this rank's outputs in the order of its prompts, with the n samples of a prompt together.
        """
        return self.engine_host.generate(
            sampling_params,
            all_prompt_token_ids,
            all_prompts,
            all_images,
            images_num,
            sleep_engine=sleep_engine,
            prompt_indices=prompt_indices,
            step=step,
        )

    def engine_generate_local(
        self, sampling_params: Any, prompt_token_ids: Any = None, multi_modal_inputs: Any = None
    ) -> list[GenerationOutput]:
        """Generate only on this rank's engine, without gathering. No collective for an engine of one rank.

        :param multi_modal_inputs: dicts with ``prompt`` and ``multi_modal_data = {"image": [...]}``.
        """
        return self.engine_host.generate_local(sampling_params, prompt_token_ids, multi_modal_inputs)

    def wakeup_inference_engine(self) -> None:
        """Wake the engine: restore weights and KV cache. Does nothing while awake."""
        self.engine_host.wake()

    def maybe_sleep_inference_engine(self) -> None:
        """Let the engine sleep, if ``--enable_engine_sleep`` is on. Does nothing while asleep."""
        self.engine_host.sleep()

    def engines_sleep(self, engines: Sequence[Any]) -> None:
        """Let several engines sleep (at ``--engine_sleep_level``). None stands for another rank's engine."""
        for engine in engines:
            if engine is not None:
                self.engine_host.sleep_engine(engine)

    def engines_wake_up(self, engines: Sequence[Any]) -> None:
        """Wake several engines. None stands for another rank's engine."""
        for engine in engines:
            if engine is not None:
                self.engine_host.wake_engine(engine)
