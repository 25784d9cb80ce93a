"""Checkpoints that are complete or absent: written to a temporary folder, digested, flushed, then renamed.

A checkpoint is a folder ``save_dir/TAG``::

    manifest.json        what it is: format, world size, parameter names and shapes, a digest of each file
    client_state.json    the caller's own state
    MODEL/               for each model: its weights and optimizer in the backend's format; scalars.json, what its
                         optimizer and scheduler have besides tensors; layout.json and hub/, its names on the hub
    ranks/RANK.json|.safetensors   random state and the caller's tensors of each rank

The backend decides what is in ``MODEL/`` (:meth:`StrategyBase.write_state`); everything else is done here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from . import checkpoint_folders as folders
from . import hub_files, hub_record
from .checkpoint_folders import CLIENT, FORMAT, MANIFEST, RANKS
from .disk import explain_write
from .errors import CheckpointError
from .hub_layout import hub_sources, inner_prefix
from .rng import restore_rng, rng_state
from .sealed_file import Seal, Seals
from .state_formats import format_of, open_state
from .state_source import match_names
from .tensor_files import write_tensors
from .weights import TensorSpec

if TYPE_CHECKING:
    from .strategy_base import ModelRecord, StrategyBase

logger = logging.getLogger("lightrft")

DEFAULT_NAME, SCALARS = "model", "scalars.json"
# Seconds that a failed save waits for other ranks to stop writing before it removes the files.
PATIENCE = 5.0


@dataclass(kw_only=True)
class LoadedCheckpoint:
    """What ``load_ckpt`` found. Unpacks as (path, client_state).

    :param path: the folder that was read.
    :param client_state: the dict given to ``save_ckpt``.
    :param rank_states: the tensors that each rank of the saving run gave, in rank order.
    :param world_size: ranks of the saving run.
    :param skipped: newer checkpoints that were damaged, with the reason.
    """

    path: Path
    client_state: dict[str, Any]
    rank_states: list[dict[str, torch.Tensor]]
    world_size: int
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Any:
        return iter((str(self.path), self.client_state))


@dataclass(kw_only=True)
class PendingSave:
    """A save whose files may still be being written.

    :param staging: the folder that becomes ``final``. :param needed: bytes that it will take, about.
    :param written: what this rank may still be writing.
    """

    staging: Path
    final: Path
    needed: int
    manifest: dict[str, Any]
    save_latest: bool
    max_num: int | None
    max_mem: float | None
    written: list[Future[Seals]] = field(default_factory=list)


# ---- saving ----------------------------------------------------------------------------------------------------------
def save(
    strategy: StrategyBase,
    model: nn.Module | Mapping[str, nn.Module],
    save_dir: Path,
    tag: str | None = None,
    max_num: int | None = None,
    max_mem: float | None = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    rank_state: Mapping[str, torch.Tensor] | None = None,
    asynchronous: bool = False,
    tokenizer: Any = None,
) -> None:
    """Write a checkpoint. Every rank must call.

    :param model: a module, or several by name, saved all or none, with the optimizers and schedulers that the strategy
        knows of them.
    :param tag: the folder's name; default ``step_N`` of ``client_state["step"]``, else the next free ``save_N``.
    :param max_num: keep at most this many checkpoints, the new one included. :param max_mem: and at most this many GB
        (10^9 bytes). Old checkpoints are removed only after success, and only those that LightRFT wrote.
    :param client_state: JSON-able state of the caller.
    :param optimizer: and ``scheduler``: of a single model, if the strategy does not know them yet.
    :param rank_state: this rank's own tensors by name, such as its part of a rollout buffer.
    :param tokenizer: a tokenizer or processor to keep beside the configuration, for ``lightrft convert``.
    :param asynchronous: return once the state is copied; ``finish_checkpoint`` completes it (as the next save does).
    :raises ValueError: max_num below 1, a tag that is no folder's name, or a client_state that is not JSON.
    :raises CheckpointError: what is there by that name is no checkpoint, or one rank could not write.
    """
    if max_num is not None and max_num < 1:
        raise ValueError(
            f"save_ckpt: max_num = {max_num}: must be at least 1 (the checkpoint being saved); None keeps all"
        )
    if max_mem is not None and max_mem <= 0:
        raise ValueError(f"save_ckpt: max_mem = {max_mem} GB: must be above 0; None sets no limit")
    if tag is not None and not folders.is_tag(tag := str(tag)):
        raise ValueError(f"save_ckpt: tag = {tag!r}: must be the name of a folder within {save_dir}, such as step_100")
    client_text = _to_json(client_state or {})
    strategy.setup_distributed()
    finish(strategy)
    records = _records(strategy, model, optimizer, scheduler)
    for key, record in records.items():
        if record.micro_steps:
            logger.warning(
                "save_ckpt: %s: the accumulated gradients of %d micro-batches are not saved: save after optimizer_step",
                key,
                record.micro_steps,
            )
    with strategy.together("save_ckpt", CheckpointError):
        tag = tag or folders.default_tag(save_dir, client_state)
        if strategy.is_rank_0() and folders.is_foreign(save_dir / tag):
            raise CheckpointError(f"save_ckpt: {save_dir / tag} is there already, and no checkpoint; pass another tag")
    name = strategy.all_gather_object(tag)[0]
    pending = PendingSave(
        staging=save_dir / f".{name}.partial",
        final=save_dir / name,
        needed=sum(_bytes_needed(record) for record in records.values()),
        manifest={
            "format": FORMAT,
            "tag": name,
            "strategy": strategy.name,
            "world_size": strategy.world_size,
            "models": {key: _shapes(record.model) for key, record in records.items()},
        },
        save_latest=save_latest,
        max_num=max_num,
        max_mem=max_mem,
    )
    staging = pending.staging
    with _discarding(strategy, pending):
        with _writing(strategy, pending):
            if strategy.is_rank_0():
                shutil.rmtree(staging, ignore_errors=True)
                for folder in (*records, RANKS):
                    (staging / folder).mkdir(parents=True)
                (staging / CLIENT).write_text(client_text)
        with _writing(strategy, pending):
            for key, record in records.items():
                pending.written.append(_future(strategy.write_state(record, staging / key, asynchronous=asynchronous)))
                if strategy.is_rank_0():
                    _write_scalars(record, staging / key)
                    hub_record.write_record(strategy, record.model, staging / key, tokenizer)
            _write_rank(strategy, staging / RANKS, rank_state or {})
    strategy._pending_save = pending
    if not asynchronous:
        finish(strategy)


def finish(strategy: StrategyBase, *, block: bool = True) -> bool:
    """Complete a pending save: digest, flush, rename, ``latest``, prune. Every rank must call.

    :return: True if nothing is pending any more.
    """
    pending = strategy._pending_save
    if pending is None:
        return True
    if not block:
        done = all(future.done() for future in pending.written)
        if not strategy.all_reduce(int(done), "min"):
            return False
    strategy._pending_save = None
    staging = pending.staging
    with _discarding(strategy, pending):
        mine: dict[str, Seal] = {}
        with _writing(strategy, pending):
            for future in pending.written:
                mine |= folders.named(future.result() or {}, staging)
        sealed = _merged(strategy.all_gather_object(mine))
        with _writing(strategy, pending):  # all files of all ranks are there
            rest = folders.seal_files(staging, strategy.rank, strategy.world_size, flush=True, known=sealed)
        files = sealed | _merged(strategy.all_gather_object(rest))
        with _writing(strategy, pending):
            if strategy.is_rank_0():
                folders.publish_save(
                    staging,
                    pending.final,
                    pending.manifest,
                    files,
                    latest=pending.save_latest,
                    max_num=pending.max_num,
                    max_mem=pending.max_mem,
                )
    return True


def _future(written: Future[Seals] | Seals | None) -> Future[Seals]:
    """The result of ``write_state`` as a future of seals."""
    if isinstance(written, Future):
        return written
    done: Future[Seals] = Future()
    done.set_result(written or {})
    return done


def _merged(parts: Iterable[Mapping[str, Seal]]) -> dict[str, Seal]:
    return {name: item for part in parts for name, item in part.items()}


@contextlib.contextmanager
def _writing(strategy: StrategyBase, save: PendingSave) -> Iterator[None]:
    """A part of a save: if one rank fails, all raise; a full disk is explained."""
    with strategy.together("save_ckpt", CheckpointError), explain_write(save.staging, save.final, save.needed):
        yield


@contextlib.contextmanager
def _discarding(strategy: StrategyBase, save: PendingSave) -> Iterator[None]:
    """If the save fails, remove its temporary folder once no rank writes there any more."""
    try:
        yield
    except Exception:
        for future in save.written:
            with contextlib.suppress(Exception):  # the save has failed already, for the reason that is raised below
                future.result()
        if strategy.is_rank_0():
            strategy.all_are_done(PATIENCE)
            shutil.rmtree(save.staging, ignore_errors=True)
        raise


# ---- loading ---------------------------------------------------------------------------------------------------------
def load(
    strategy: StrategyBase,
    model: nn.Module | Mapping[str, nn.Module],
    load_dir: Path,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
) -> LoadedCheckpoint:
    """Read the newest complete checkpoint, or the one named ``tag``. Every rank must call.

    Digests are checked first. If the newest is damaged, a warning is printed and the one before is read; not so for a
    named one. Any backend and any number of ranks may have written it. ``load_dir`` may also be the folder of one
    checkpoint, a hub folder (weights only), or what another library wrote: PyTorch's DCP, or DeepSpeed's
    ``engine.save_checkpoint`` if lightrft-deepspeed is installed.

    :param load_module_strict: parameter names and shapes must be equal; False is refused.
    :param load_module_only: weights alone: no optimizer, scheduler, random state.
    :raises CheckpointError: there is no complete checkpoint, or it is another model's (names the first difference).
    """
    if not load_module_strict:
        raise ValueError("load_ckpt: load_module_strict=False is not possible; load a part with import_weights")
    strategy.setup_distributed()
    finish(strategy)
    records = _records(strategy, model, optimizer, scheduler)
    skipped: list[str] = []
    tag = None if tag is None else str(tag)
    if tag is None and folders.is_ours(load_dir):
        load_dir, tag = load_dir.parent, load_dir.name
    with strategy.together("load_ckpt", CheckpointError):
        found = folders.candidates(load_dir, tag) if strategy.is_rank_0() else []
        # DeepSpeed writes a file `latest` too, which may name a folder that is not ours.
        ours = any((load_dir / name / MANIFEST).exists() for name in found)
        foreign = _foreign(load_dir, tag) if strategy.is_rank_0() and not ours else None
    candidates, foreign = strategy.all_gather_object((found, foreign))[0]
    if foreign is not None:
        with strategy.together("load_ckpt", CheckpointError):
            return _read_foreign(strategy, records, foreign, load_optimizer_states and not load_module_only)
    if not candidates:
        wanted = f"no checkpoint {tag!r}" if tag else "no checkpoint"
        raise CheckpointError(f"{load_dir}: {wanted} here; present: {', '.join(folders.names(load_dir)) or 'nothing'}")
    for name in candidates:
        folder = load_dir / name
        problems = [
            p for p in strategy.all_gather_object(folders.damage(folder, strategy.rank, strategy.world_size)) if p
        ]
        if not problems:
            with strategy.together("load_ckpt", CheckpointError):
                return _read(
                    strategy,
                    records,
                    folder,
                    skipped,
                    optimizer=load_optimizer_states,
                    scheduler=load_lr_scheduler_states,
                    module_only=load_module_only,
                )
        skipped.append(f"{name}: {problems[0]}")
        if tag is None:
            strategy.print(f"checkpoint {folder} is damaged ({problems[0]}); trying the previous one")
    raise CheckpointError(f"{load_dir}: no complete checkpoint; " + "; ".join(skipped))


def _read(
    strategy: StrategyBase,
    records: Mapping[str, ModelRecord],
    folder: Path,
    skipped: list[str],
    *,
    optimizer: bool,
    scheduler: bool,
    module_only: bool,
) -> LoadedCheckpoint:
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, record in records.items():
        _check_same_model(folder, name, manifest["models"], record.model)
        if not module_only:
            _check_receivers(record, folder / name, optimizer=optimizer, scheduler=scheduler)
    for name, record in records.items():
        strategy.read_state(record, folder / name, optimizer=optimizer and not module_only)
        if not module_only:
            _read_scalars(record, folder / name, optimizer=optimizer, scheduler=scheduler)
    saved_ranks = int(manifest["world_size"])
    states = [load_file(folder / RANKS / f"{rank}.safetensors") for rank in range(saved_ranks)]
    if not module_only and saved_ranks:  # none if it was converted from another library's
        same = saved_ranks == strategy.world_size
        plain = json.loads((folder / RANKS / f"{strategy.rank if same else 0}.json").read_text())
        if same:
            restore_rng(strategy.device, plain["rng"], states[strategy.rank])
        strategy.engine_host.load_state_dict(plain["engine"])
    return LoadedCheckpoint(
        path=folder,
        client_state=json.loads((folder / CLIENT).read_text()),
        rank_states=[{k: v for k, v in state.items() if not k.startswith("rng.")} for state in states],
        world_size=saved_ranks,
        skipped=skipped,
    )


def import_by_name(
    specs: Mapping[str, TensorSpec],
    source: Iterable[tuple[str, torch.Tensor]],
    target: Callable[[str], torch.Tensor],
) -> None:
    """Copy (hub name, tensor) pairs into ``target(name)``; every one of ``specs`` must come, once.

    :raises CheckpointError: an unknown name, another shape, or missing names.
    """
    missing = dict(specs)
    for name, tensor in source:
        spec = missing.pop(name, None)
        if spec is None:
            raise CheckpointError(f"{name}: not a tensor of this model, or given twice")
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name}: {tuple(tensor.shape)} given, but {spec.shape} in this model")
        target(name).copy_(tensor)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, the first is {next(iter(missing))}")


# ---- parts -----------------------------------------------------------------------------------------------------------
def _records(
    strategy: StrategyBase, model: nn.Module | Mapping[str, nn.Module], optimizer: Any, scheduler: Any
) -> dict[str, ModelRecord]:
    if isinstance(model, Mapping):
        return {name: strategy.record(module) for name, module in model.items()}
    record = strategy.record(model)
    record.remember(optimizer, scheduler)
    return {DEFAULT_NAME: record}


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in hub_sources(model)}


def _bytes_needed(record: ModelRecord) -> int:
    """Approximate size of a model and its AdamW states: a trained parameter is stored in fp32, with two moments."""
    shapes, sources = _shapes(record.model), hub_sources(record.model)
    trains = record.optimizer is not None
    return sum(math.prod(shapes[n]) * (12 if trains and t.requires_grad else t.element_size()) for n, t in sources)


def _write_scalars(record: ModelRecord, folder: Path) -> None:
    """What an optimizer and a scheduler have besides tensors."""
    state: dict[str, Any] = {"loss_scale": record.loss_scale.state_dict(), "skipped_steps": record.skipped_steps}
    if record.optimizer is not None:
        state["param_groups"] = [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in record.optimizer.param_groups
        ]
    if record.scheduler is not None:
        state["scheduler"] = {k: v for k, v in record.scheduler.state_dict().items() if _is_plain(v)}
    (folder / SCALARS).write_text(_to_json(state))


def _read_scalars(record: ModelRecord, folder: Path, *, optimizer: bool, scheduler: bool) -> None:
    state = json.loads((folder / SCALARS).read_text())
    record.loss_scale.load_state_dict(state["loss_scale"])
    record.skipped_steps = state["skipped_steps"]
    if optimizer and record.optimizer is not None and "param_groups" in state:
        groups = record.optimizer.param_groups
        if len(groups) != len(state["param_groups"]):
            raise CheckpointError(
                f"{folder}: its optimizer has {len(state['param_groups'])} parameter groups, this one {len(groups)}: "
                "create it with the same groups, or pass load_optimizer_states=False"
            )
        for group, saved in zip(groups, state["param_groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    if scheduler and record.scheduler is not None and "scheduler" in state:
        record.scheduler.load_state_dict(state["scheduler"])


def _check_receivers(record: ModelRecord, folder: Path, *, optimizer: bool, scheduler: bool) -> None:
    """Refuse to drop a saved state: a run that starts with a fresh optimizer is not resumed."""
    state = json.loads((folder / SCALARS).read_text())
    if optimizer and "param_groups" in state and record.optimizer is None:
        raise CheckpointError(
            f"{folder}: has an optimizer's state, but this model has no optimizer: call create_optimizer(model) first, "
            "or pass load_optimizer_states=False, or load_module_only=True"
        )
    if scheduler and "scheduler" in state and record.scheduler is None:
        raise CheckpointError(
            f"{folder}: has a scheduler's state, but the strategy knows no scheduler of this model: pass "
            "load_ckpt(..., scheduler=scheduler), or load_lr_scheduler_states=False, or load_module_only=True"
        )


def _write_rank(strategy: StrategyBase, folder: Path, rank_state: Mapping[str, torch.Tensor]) -> None:
    plain, tensors = rng_state(strategy.device)
    mine = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in rank_state.items()}
    if clash := [name for name in mine if name.startswith("rng.")]:
        raise ValueError(f"save_ckpt: names in rank_state must not start with 'rng.': {', '.join(clash)}")
    write_tensors(folder / f"{strategy.rank}.safetensors", {**mine, **tensors})
    state = {"rng": plain, "engine": strategy.engine_host.state_dict()}
    (folder / f"{strategy.rank}.json").write_text(json.dumps(state))


def _check_same_model(folder: Path, name: str, saved: Mapping[str, Any], model: nn.Module) -> None:
    if name not in saved:
        raise CheckpointError(f"{folder}: holds no model {name!r}; it holds {', '.join(saved)}")
    stored = hub_record.HubRecord.read(folder / name)
    prefix = stored.prefix if stored is not None else None
    match_names(folder, saved[name], prefix, _shapes(model), inner_prefix(model))


def _foreign(load_dir: Path, tag: str | None) -> Path | None:
    """A folder with one model's state in a known format of another library, or a hub folder."""
    folder = load_dir if tag is None else load_dir / tag
    return folder if folder.is_dir() and (format_of(folder) or hub_files.is_hub_folder(folder)) else None


def _read_foreign(
    strategy: StrategyBase, records: Mapping[str, ModelRecord], folder: Path, optimizer: bool
) -> LoadedCheckpoint:
    """Load weights, and optimizer states and scheduler if there are any, from another library's files."""
    if len(records) > 1:
        raise CheckpointError(f"{folder}: holds one model, {', '.join(records)} were requested; load them one by one")
    (record,) = records.values()
    if format_of(folder) is None:
        strategy.import_weights(record.model, hub_files.hub_tensors(folder))
    else:
        source = open_state(folder)
        receiver = record.optimizer if optimizer and any(e.moments for e in source.entries.values()) else None
        strategy.take_state(record.model, receiver, source)
        scheduler = source.scalars.get("scheduler")
        if optimizer and record.scheduler is not None and scheduler is not None:
            record.scheduler.load_state_dict(scheduler)
    return LoadedCheckpoint(path=folder, client_state={}, rank_states=[], world_size=0)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _to_json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_ckpt: client_state must be JSON (numbers, strings, lists, dicts): {error}") from error
