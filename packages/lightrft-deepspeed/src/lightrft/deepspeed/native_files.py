"""Read what ``engine.save_checkpoint`` wrote with ZeRO 1, 2 or 3, without its engine, its loader or its pickles.

::

    latest                                          the newest TAG
    TAG/mp_rank_00_model_states.pt                  stages 1, 2: names, shapes, buffers, 16-bit weights
    TAG/zero_pp_rank_R_mp_rank_00_model_states.pt   stage 3: the same, of rank R
    TAG/*zero_pp_rank_R_mp_rank_00_optim_states.pt  fp32 weights and moments of rank R, in flat groups

Files are opened weights-only, with the few classes allowed that DeepSpeed pickles into them, and without their tensors:
only their places in the file are noted, and each flat range is read when it is needed.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.state_source import WEIGHT, PieceOf, Placed, StateFormat, StateSource, TensorEntry
from lightrft.strategy.tensor_files import StoredTensor

from .environment import load_deepspeed

OPTIMIZER_FILES, MODEL_FILES, LATEST = "*zero_pp_rank_*optim_states.pt", "*model_states.pt", "latest"


def open_native(folder: Path) -> StateSource:
    """Read a checkpoint's index.

    :raises CheckpointError: a file is missing, damaged, names a class that no checkpoint needs, or was written with
        model or expert parallelism, which are not supported.
    """
    folder = _tag_folder(folder)
    optimizers = _by_rank(folder, OPTIMIZER_FILES)
    first = _load(optimizers[0])
    states = [_optimizer_state(path, first if rank == 0 else _load(path)) for rank, path in enumerate(optimizers)]
    stage = int(getattr(states[0]["zero_stage"], "value", states[0]["zero_stage"]) if "zero_stage" in states[0] else 1)
    ranks = states[0].get("partition_count", len(states))
    if (ranks := max(ranks) if isinstance(ranks, list) else int(ranks)) != len(states):
        raise CheckpointError(f"{folder}: {ranks} ranks wrote it, but there are optimizer states of {len(states)}")
    models = [_load(path) for path in _by_rank(folder, MODEL_FILES)]
    try:
        files = optimizers, states, models
        if stage == 3:
            if len(models) != ranks:
                raise CheckpointError(f"{folder}: {ranks} ranks wrote it, but there are model states of {len(models)}")
            return _stage_3(folder, *files)
        return _stage_1_2(folder, *files)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not a ZeRO checkpoint in the form of DeepSpeed 0.19: {error!r}") from error


def recognises(folder: Path) -> bool:
    """Whether it is a tag's folder, or one whose ``latest`` names such a folder."""
    try:
        return next(_tag_folder(folder).glob(OPTIMIZER_FILES), None) is not None
    except (OSError, CheckpointError):
        return False


NATIVE = StateFormat(
    name="deepspeed",
    title="DeepSpeed's own checkpoint (zero_pp_rank_*_optim_states.pt)",
    recognises=recognises,
    open=open_native,
)


# ---- the stages ------------------------------------------------------------------------------------------------------
def _stage_1_2(
    folder: Path, paths: Sequence[Path], states: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> StateSource:
    """Stages 1 and 2: each group's parameters are concatenated into a flat vector, which is split into the ranks'
    partitions."""
    model, model_path = models[0], _by_rank(folder, MODEL_FILES)[0]
    pieces: dict[tuple[str, str], list[Placed]] = {}
    done: dict[str, int] = {}
    for path, state in zip(paths, states, strict=True):
        base = state["base_optimizer_state"]
        for group, fragments in enumerate(state["param_slice_mappings"]):
            flats = {WEIGHT: state["single_partition_of_fp32_groups"][group], **_moments(base, group)}
            for name, address in fragments.items():
                start = done.get(name, 0)  # the partitions are in rank order, and so are a parameter's parts
                done[name] = start + address.numel
                for kind, flat in flats.items():
                    part = PieceOf(piece=_stored(path, kind, flat), start=address.start, numel=address.numel)
                    pieces.setdefault((name, kind), []).append((start, part))
    untrained = _untrained(model)
    for name, tensor in untrained.items():
        pieces[name, WEIGHT] = [(0, _stored(model_path, name, tensor))]
    shapes = {name: tuple(tensor.shape) for name, tensor in untrained.items()}
    return _source(folder, model, paths[0], states[0]["base_optimizer_state"], pieces, shapes)


def _stage_3(
    folder: Path, paths: Sequence[Path], states: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> StateSource:
    """Stage 3: each parameter is split into equal padded parts; a rank's parts are concatenated in flat groups."""
    model, ranks = models[0], len(states)
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    pieces: dict[tuple[str, str], list[Placed]] = {}
    for rank, (path, state) in enumerate(zip(paths, states, strict=True)):
        base, flats = state["optimizer_state_dict"], state["fp32_flat_groups"]
        begins = [0, *accumulate(flat.numel() for flat in flats)]
        offset = 0
        for name, shape in shapes.items():
            each = -(-shape.numel() // ranks)
            start, stop = min(rank * each, shape.numel()), min((rank + 1) * each, shape.numel())
            for group, low, high in _spans(begins, offset, offset + stop - start):
                stored = {WEIGHT: flats[group], **_moments(base, group)}
                for kind, flat in stored.items():
                    part = PieceOf(piece=_stored(path, kind, flat), start=low - begins[group], numel=high - low)
                    pieces.setdefault((name, kind), []).append((start + low - offset, part))
            offset += each
    model_paths = _by_rank(folder, MODEL_FILES)
    untrained = {name: tuple(tensor.shape) for name, tensor in _buffers(model).items()}
    for name, tensor in _buffers(model).items():
        pieces[name, WEIGHT] = [(0, _stored(model_paths[0], name, tensor))]
    for name, shape in (model.get("frozen_param_shapes") or {}).items():
        untrained[name] = tuple(shape)
        each = -(-shape.numel() // ranks)
        for rank, (path, part) in enumerate(zip(model_paths, models, strict=True)):
            numel = max(0, min(each, shape.numel() - rank * each))
            stored = _stored(path, name, part["frozen_param_fragments"][name])
            pieces.setdefault((name, WEIGHT), []).append((rank * each, PieceOf(piece=stored, start=0, numel=numel)))
    return _source(folder, model, paths[0], states[0]["optimizer_state_dict"], pieces, untrained)


def _spans(begins: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The flat groups that overlap ``[start, stop)``: (group, from, to)."""
    for group, (low, high) in enumerate(pairwise(begins)):
        if max(low, start) < min(high, stop):
            yield group, max(low, start), min(high, stop)


def _source(
    folder: Path,
    model: Mapping[str, Any],
    path: Path,
    base: Mapping[str, Any],
    pieces: dict[tuple[str, str], list[Placed]],
    untrained: Mapping[str, tuple[int, ...]],
) -> StateSource:
    """Build the source.

    :param path: of the first rank's optimizer file. :param base: the optimizer's state in it.
    :param untrained: shapes of frozen parameters and buffers.
    """
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    trained = set(shapes)
    shapes |= untrained
    dtypes: dict[str, dict[str, torch.dtype]] = {name: {} for name in shapes}
    for (name, kind), placed in pieces.items():
        dtypes[name][kind] = _dtype(placed[0][1])
    steps = [int(_number(path, state["step"])) for state in base["state"].values() if "step" in state]
    entries = {
        name: TensorEntry(shape=shape, dtypes=dtypes[name], step=max(steps, default=0) if name in trained else 0)
        for name, shape in shapes.items()
    }
    scheduler = model.get("lr_scheduler")
    scalars: dict[str, Any] = {"skipped_steps": int(model.get("skipped_steps") or 0)}
    if isinstance(scheduler, dict) and all(_is_plain(value) for value in scheduler.values()):
        scalars["scheduler"] = scheduler
    return StateSource(folder, "deepspeed", entries, pieces, scalars=scalars)


def _moments(base: Mapping[str, Any], group: int) -> dict[str, Any]:
    state = base["state"].get(group, {})
    return {kind: value for kind, value in state.items() if isinstance(value, torch.Tensor) and value.dim() == 1}


def _untrained(model: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Frozen parameters and buffers, which stages 1 and 2 store whole (stage 1 does not list the frozen ones)."""
    trained = {name for group in model["param_shapes"] for name in group}
    tied = model.get("shared_params") or {}
    return {name: tensor for name, tensor in model["module"].items() if name not in trained and name not in tied}


def _buffers(model: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    module, tied = model["module"], model.get("shared_params") or {}
    return {name: module[name] for name in model["buffer_names"] if name in module and name not in tied}


# ---- files -----------------------------------------------------------------------------------------------------------
def _tag_folder(folder: Path) -> Path:
    if not (folder / LATEST).is_file():
        return folder
    tag = (folder / LATEST).read_text().strip()
    if Path(tag).name != tag or not (folder / tag).is_dir():
        raise CheckpointError(f"{folder / LATEST}: names {tag!r}, which is not a folder here")
    return folder / tag


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """All files of a kind, in rank order.

    :raises CheckpointError: one is missing.
    """
    found: dict[int, Path] = {}
    for path in folder.glob(pattern):
        if not re.search(r"mp_rank_00_", path.name) or "expert" in path.name:
            raise CheckpointError(f"{path}: written with model or expert parallelism, which is not supported")
        rank = re.search(r"zero_pp_rank_(\d+)_", path.name)
        found[int(rank[1]) if rank else 0] = path
    for rank in range(max(found, default=0) + 1):
        if rank not in found:
            raise CheckpointError(f"{folder}: rank {rank}'s file {pattern} is missing")
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict[str, Any]:
    """A file's structure, its tensors without memory."""
    load_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(allowed), FakeTensorMode():
            content = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not loaded, it names what no checkpoint needs: {_first_line(error)}") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read, it is damaged or truncated: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _optimizer_state(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    state = content.get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: has no optimizer state")
    return state


def _stored(path: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    """The place of a loaded tensor in its file."""
    begin: Any = tensor.untyped_storage()._checkpoint_offset
    offset = int(begin) + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredTensor(path=path, name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), offset=offset)


def _dtype(piece: Any) -> torch.dtype:
    while isinstance(piece, PieceOf):
        piece = piece.piece
    return piece.dtype


def _number(path: Path, value: Any) -> float:
    return float(_stored(path, "step", value).read()) if isinstance(value, torch.Tensor) else float(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
