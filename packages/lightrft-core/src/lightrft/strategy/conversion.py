"""Convert checkpoints and hub folders into each other, one tensor at a time, in one process.

::

    hf      a Hugging Face folder: config.json, safetensors by hub name, tokenizer; weights alone
    ds      a checkpoint whose state is in portable fragments, as DeepspeedStrategy writes it
    fsdp    a checkpoint whose state is in PyTorch's DCP, as FSDPV2Strategy writes it

It also reads what the libraries themselves write: a plain DCP folder, DeepSpeed's ``engine.save_checkpoint`` (with
lightrft-deepspeed installed). From checkpoint to checkpoint everything is converted: weights, optimizer states,
schedulers, client state and the ranks' random states. The result is written to a temporary folder and renamed when it
is complete.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from . import checkpoint, fragments, hub_files
from . import checkpoint_folders as folders
from .disk import explain_write
from .errors import CheckpointError
from .hub_layout import HubLayout, hub_sources
from .hub_record import HUB, HubRecord, copy_companions
from .optimizers import LossScale
from .sealed_file import Seals
from .state_formats import format_of, known_formats, open_state
from .state_source import WEIGHT, StateSource, read_json
from .tensor_files import byte_view

Kind = Literal["hf", "ds", "fsdp"]
STRATEGIES: Mapping[str, str] = {"ds": "deepspeed", "fsdp": "fsdp"}
KIND_OF_FORMAT: Mapping[str, str] = {"portable": "ds", "deepspeed": "ds", "dcp": "fsdp", "hf": "hf"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Progress(Protocol):
    """Receives the progress of a conversion."""

    def start(self, title: str, total: int) -> None:
        """Work of ``total`` bytes begins."""
        ...

    def advance(self, name: str, nbytes: int) -> None:
        """A tensor is done."""
        ...


class _Quiet:
    def start(self, title: str, total: int) -> None: ...

    def advance(self, name: str, nbytes: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    :param read: format that was read. :param verified: every tensor was read back and compared.
    """

    source: Path
    target: Path
    read: str
    to: str
    tensors: int
    nbytes: int
    seconds: float
    verified: bool

    def __str__(self) -> str:
        checked = ", each compared with its source" if self.verified else ""
        return (
            f"{self.source} ({self.read}) -> {self.target} ({self.to}): {self.tensors} tensors, "
            f"{self.nbytes / 1e6:.1f} MB in {self.seconds:.1f} s{checked}"
        )


@dataclass(kw_only=True)
class _Input:
    """What is to be converted. :param models: each model's folder. :param manifest: of LightRFT's own checkpoints."""

    folder: Path
    models: dict[str, Path]
    manifest: dict[str, Any] | None = None
    sources: dict[str, StateSource] = field(default_factory=dict)
    records: dict[str, HubRecord | None] = field(default_factory=dict)
    companions: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def read(self) -> str:
        return next(iter(self.sources.values())).format


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Kind = "hf",
    expect: str | None = None,
    tag: str | None = None,
    model: str | None = None,
    pretrain: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    verify: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint or hub folder.

    :param source: a checkpoint, a folder of checkpoints (the newest complete one is taken, or ``tag``), or a hub
        folder.
    :param target: a new folder. :param force: replace an existing one, once the new one is complete.
    :param expect: refuse a source of another kind ("hf", "ds", "fsdp").
    :param model: which model of a checkpoint that holds several; needed for ``to="hf"`` unless there is an actor. For a
        hub folder: the name that its model gets in the checkpoint (default: what ``save_ckpt(model)`` calls it).
    :param pretrain: a folder with the model's config.json, if the checkpoint has none; its tokenizer is copied too.
    :param dtype: cast floating-point weights (``to="hf"``); None keeps their stored precision.
    :param max_shard_size: of one safetensors file, such as "5GB" (10^9 bytes each), "500MB", or bytes.
    :param verify: read every tensor back and compare.
    :raises CheckpointError: whatever is wrong with the source, or the target exists.
    :raises ValueError: an option that is not supported here.
    """
    begun = time.monotonic()
    source, target, progress = Path(source), Path(target).absolute(), progress or _Quiet()
    max_bytes = parse_size(max_shard_size)
    if dtype is not None and to != "hf":
        raise ValueError(f"dtype: {to} checkpoints keep the precision that training needs; only to='hf' can cast")
    if target.exists() and not force:
        raise CheckpointError(f"{target}: exists; choose another folder, or replace it with --force")
    if source.absolute().is_relative_to(target):
        raise CheckpointError(f"{target}: contains the source, {source}; choose another folder")
    given = _find(source, tag)
    _open(given, model, Path(pretrain) if pretrain is not None else None, to)
    if expect is not None and (kind := KIND_OF_FORMAT.get(given.read, given.read)) != expect:
        raise CheckpointError(
            f"{given.folder}: is a {kind} source ({given.read}), not {expect}; `lightrft convert` accepts any"
        )
    if KIND_OF_FORMAT.get(given.read) == to == "hf":
        raise CheckpointError(
            f"{given.folder}: is a Hugging Face folder already; choose what to make with --to ds or --to fsdp"
        )
    with _staged(target, _bytes_needed(given, to, dtype)) as staging:
        if to == "hf":
            count, nbytes = _to_hub(given, staging, dtype, max_bytes, verify, progress)
        else:
            count, nbytes = _to_checkpoint(given, staging, target.name, to, verify, progress)
    return Conversion(
        source=given.folder,
        target=target,
        read=given.read,
        to=to,
        tensors=count,
        nbytes=nbytes,
        seconds=time.monotonic() - begun,
        verified=verify,
    )


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or a plain number.

    :raises ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    if (
        match is None
        or match[2].upper() not in _UNITS
        or (nbytes := int(float(match[1]) * _UNITS[match[2].upper()])) < 1
    ):
        raise ValueError(f"--max_shard_size {size}: must be a size such as 5GB, 500MB or 2GiB")
    return nbytes


def trace_hub(pretrain: Path) -> tuple[HubRecord, dict[str, tuple[int, ...]]]:
    """A model's hub tensors and the shapes of its module tensors, from its configuration alone, on the meta device.

    :raises CheckpointError: the folder has no configuration, or transformers is not installed.
    """
    if not (pretrain / hub_files.CONFIG).is_file():
        raise CheckpointError(f"{pretrain}: has no {hub_files.CONFIG}; --pretrain must be a model's folder")
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("names on the hub need transformers: pip install transformers") from error
    config: Any = transformers.AutoConfig.from_pretrained(pretrain)
    architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
    found: Any = getattr(transformers, architecture, None)
    if found is None:
        raise CheckpointError(
            f"{pretrain}: transformers {transformers.__version__} does not have its architecture {architecture}"
        )
    with torch.device("meta"):
        built = found.from_config(config) if hasattr(found, "from_config") else found(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in hub_sources(built)}
    return HubRecord.of(built, HubLayout(built)), shapes


# ---- reading ---------------------------------------------------------------------------------------------------------
def _find(source: Path, tag: str | None) -> _Input:
    """The folder to convert."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    folder = source / tag if tag is not None else source
    if tag is None and not (source / folders.MANIFEST).is_file():
        whole = (source / name for name in folders.candidates(source, None) if folders.is_ours(source / name))
        folder = next(whole, source)
    if (folder / folders.MANIFEST).is_file():
        if problem := folders.damage(folder):
            raise CheckpointError(f"{folder}: {problem}")
        manifest = read_json(folder / folders.MANIFEST)
        return _Input(folder=folder, models={name: folder / name for name in manifest["models"]}, manifest=manifest)
    if not folder.is_dir() or not (format_of(folder) or hub_files.is_hub_folder(folder)):
        titles = "; ".join(known.title for known in known_formats())
        there = f" (present: {', '.join(folders.names(source))})" if tag is not None else ""
        below = sorted(path for path in folder.glob("*/") if folders.whole_checkpoints(path))
        there += f"; did you mean {below[0]}?" if below else ""
        raise CheckpointError(
            f"{folder}: no checkpoint{there}; known are a LightRFT checkpoint ({folders.MANIFEST}); a Hugging Face "
            f"folder ({hub_files.CONFIG} and safetensors); {titles}"
        )
    return _Input(folder=folder, models={checkpoint.DEFAULT_NAME: folder})


def _open(given: _Input, model: str | None, pretrain: Path | None, to: str) -> None:
    """Open the models to convert, and find their hub tensors."""
    hub = given.manifest is None and format_of(given.folder) is None
    if hub:
        given.models = {model or checkpoint.DEFAULT_NAME: given.folder}
        pretrain = pretrain or given.folder
    elif to == "hf" or model is not None:
        name = model or next((n for n in ("actor", *given.models) if n in given.models and _only(given, n)), None)
        if name not in given.models:
            wanted = f"no model {name!r}" if name else "several models"
            raise CheckpointError(f"{given.folder}: {wanted}; choose with --model: {', '.join(given.models)}")
        given.models = {name: given.models[name]}
    traced = trace_hub(pretrain) if pretrain is not None else None
    for name, folder in given.models.items():
        given.companions[name] = [path for path in (folder / HUB, pretrain) if path is not None and path.is_dir()]
        if hub:
            assert traced is not None
            given.records[name] = traced[0]
            given.sources[name] = hub_files.open_hub(folder, traced[0].tensors, traced[1])
            continue
        state, record = open_state(folder), HubRecord.read(folder)
        if record is None and traced is not None:
            record, state = traced[0], state.named_as(traced[1])
        given.sources[name], given.records[name] = state, record


def _only(given: _Input, name: str) -> bool:
    return name == "actor" or len(given.models) == 1


# ---- writing ---------------------------------------------------------------------------------------------------------
def _to_hub(
    given: _Input, staging: Path, dtype: torch.dtype | None, max_bytes: int, verify: bool, progress: Progress
) -> tuple[int, int]:
    ((name, source),) = given.sources.items()
    record = given.records[name]
    if record is None or not given.companions[name]:
        raise CheckpointError(
            f"{given.folder}: does not tell which model it is; give a folder with the model's config.json: "
            "--pretrain DIR"
        )
    source = source.weights_alone()
    sizes = {hub.name: _nbytes(hub.shape, source.entries[hub.source].dtypes[WEIGHT], dtype) for hub in record.tensors}
    progress.start("writing", sum(sizes.values()))
    hub_files.write_hub(
        source,
        record.tensors,
        staging,
        dtype=dtype,
        max_bytes=max_bytes,
        progress=progress.advance,
        whole=partial(record.whole, source),
    )
    copy_companions(given.companions[name], staging)
    if (staging / hub_files.CONFIG).is_file():  # a module that is none of transformers' has only weights
        _name_dtype(staging / hub_files.CONFIG, source, dtype)
    if verify:
        progress.start("comparing", sum(sizes.values()))
        _verify_hub(source, record, staging, dtype, progress)
    return len(sizes), sum(sizes.values())


def _to_checkpoint(
    given: _Input, staging: Path, tag: str, to: str, verify: bool, progress: Progress
) -> tuple[int, int]:
    if to == "ds":
        write = fragments.write_source
    else:
        from .dcp_files import write_source as write
    sizes = [
        _nbytes(entry.shape, dtype, None)
        for source in given.sources.values()
        for entry in source.entries.values()
        for dtype in entry.dtypes.values()
    ]
    progress.start("writing", sum(sizes))
    seals: Seals = {}
    for name, source in given.sources.items():
        folder = staging / name
        folder.mkdir()
        seals |= write(source, folder, progress=progress.advance)
        _copy_rest(given, name, folder)
    ranks = 0
    (staging / folders.RANKS).mkdir()
    if given.manifest is not None:
        ranks = int(given.manifest["world_size"])
        shutil.copytree(given.folder / folders.RANKS, staging / folders.RANKS, dirs_exist_ok=True)
        shutil.copyfile(given.folder / folders.CLIENT, staging / folders.CLIENT)
    else:
        (staging / folders.CLIENT).write_text("{}")
    if verify:
        progress.start("comparing", sum(sizes))
        for name, source in given.sources.items():
            _verify_state(source, open_state(staging / name), progress)
    shapes = {
        name: {key: list(entry.shape) for key, entry in source.entries.items()}
        for name, source in given.sources.items()
    }
    folders.write_manifest(staging, seals, tag=tag, strategy=STRATEGIES[to], world_size=ranks, models=shapes)
    return len(sizes), sum(sizes)


def _copy_rest(given: _Input, name: str, folder: Path) -> None:
    """Scalars, layout and configuration of one model."""
    scalars = given.models[name] / checkpoint.SCALARS
    if given.manifest is not None:
        shutil.copyfile(scalars, folder / checkpoint.SCALARS)
    else:
        empty = {"loss_scale": LossScale(enabled=False).state_dict(), "skipped_steps": 0}
        (folder / checkpoint.SCALARS).write_text(json.dumps({**empty, **given.sources[name].scalars}))
    if (record := given.records[name]) is not None:
        record.write(folder)
    if given.companions[name]:
        (folder / HUB).mkdir()
        copy_companions(given.companions[name], folder / HUB)


def _name_dtype(config: Path, source: StateSource, dtype: torch.dtype | None) -> None:
    """Set the configuration's dtype to that of the weights, if they have one in common."""
    kinds = {hub_files.cast_dtype(entry.dtypes[WEIGHT], dtype) for entry in source.entries.values()}
    floating = {kind for kind in kinds if kind.is_floating_point}
    if len(floating) == 1:
        settings = read_json(config)
        key = "torch_dtype" if "torch_dtype" in settings and "dtype" not in settings else "dtype"
        settings[key] = str(floating.pop()).removeprefix("torch.")
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _bytes_needed(given: _Input, to: str, dtype: torch.dtype | None) -> int:
    """Approximate size of the target: only weights for a hub folder."""
    return sum(
        _nbytes(entry.shape, own, dtype)
        for source in given.sources.values()
        for entry in source.entries.values()
        for kind, own in entry.dtypes.items()
        if to != "hf" or kind == WEIGHT
    )


def _nbytes(shape: tuple[int, ...], own: torch.dtype, cast: torch.dtype | None) -> int:
    return torch.Size(shape).numel() * hub_files.cast_dtype(own, cast).itemsize


# ---- comparing -------------------------------------------------------------------------------------------------------
def _verify_hub(
    source: StateSource, record: HubRecord, folder: Path, dtype: torch.dtype | None, progress: Progress
) -> None:
    written = hub_files.hub_index(folder)
    _same_names(folder, {hub.name for hub in record.tensors}, set(written))
    whole, of = torch.empty(0), None
    for hub in record.tensors:
        if hub.source != of:
            del whole
            whole, of = record.whole(source, hub.source), hub.source
        kept = hub_files.cast_dtype(source.entries[hub.source].dtypes[WEIGHT], dtype)
        wanted = hub.view(whole).to(kept).contiguous()
        _same_bits(folder, hub.name, wanted, written[hub.name].read())
        progress.advance(hub.name, wanted.nbytes)


def _verify_state(source: StateSource, written: StateSource, progress: Progress) -> None:
    _same_names(written.folder, set(source.entries), set(written.entries))
    for name, entry in source.entries.items():
        there = written.entries[name]
        if (entry.shape, entry.step, dict(entry.dtypes)) != (there.shape, there.step, dict(there.dtypes)):
            raise CheckpointError(f"{written.folder}: {name} was read back as {there}, expected {entry}")
        for kind in entry.dtypes:
            wanted = source.read(name, kind)
            _same_bits(written.folder, f"{kind} of {name}", wanted, written.read(name, kind))
            progress.advance(name, wanted.nbytes)


def _same_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    if different := sorted(wanted ^ found):
        raise CheckpointError(f"{folder}: {different[0]} is {'missing' if different[0] in wanted else 'unexpected'}")


def _same_bits(folder: Path, name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    if wanted.dtype != found.dtype or byte_view(wanted) != byte_view(found):
        raise CheckpointError(f"{folder}: {name} differs from its source: disk or memory corrupted it")


@contextmanager
def _staged(target: Path, needed: int) -> Iterator[Path]:
    """A temporary folder that replaces ``target`` if the block succeeds, and is removed if not.

    :param needed: bytes that it will take, about.
    :raises CheckpointError: it could not be written; for a full disk, how much space was missing.
    """
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with explain_write(staging, target, needed):
            staging.mkdir(parents=True)
            yield staging
            folders.publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
