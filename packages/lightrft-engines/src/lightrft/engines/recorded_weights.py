"""Where each hub tensor is in an engine's parameters, recorded from the engine's own loaders.

vLLM and SGLang fuse modules (qkv, gate-up, an expert set), split them over ranks and rename them. Instead of knowing
how, we run the model's ``load_weights`` once on meta tensors and record every copy that it would make: which slice of
which hub tensor goes to which slice of which parameter. After that a sync repeats these copies, one tensor at a time
and in any order, and reading back makes them in the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightrft.strategy.errors import NotBuiltError, WeightSyncError
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import TensorSpec, take_all_samples

from .manifest import Manifest, read_manifest, untied

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a hub tensor (``shape``, ``stride``, ``offset`` within it) and its place in the engine."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    target: torch.Tensor

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a whole, contiguous hub tensor."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class WeightMap:
    """The weights of an engine's model by hub name.

    :param engine: its name, for messages. :param model: the engine's module.
    :param config: the transformers configuration. :param dtype: in which weights are sent.
    :param split: the module is one part of several, and may have nothing of some tensors (:func:`check_whole`).
    :raises NotBuiltError: the engine stores some weights in a form that cannot be streamed into.
    """

    def __init__(
        self, engine: str, model: torch.nn.Module, config: Any, dtype: torch.dtype, *, split: bool = False
    ) -> None:
        self.manifest = expected_manifest(config)
        self._engine = engine
        self._dtype = dtype
        self._written: set[str] = set()
        copies = trace_copies(engine, model, self.manifest.shapes, dtype)
        self._pieces = {name: copies.pieces.get(name, []) for name in self.manifest.shapes}
        self._check_targets(model, copies.padding, split)

    def counts(self) -> dict[str, int]:
        """Elements of each tensor on this rank."""
        return {name: sum(piece.target.numel() for piece in pieces) for name, pieces in self._pieces.items()}

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """:raises WeightSyncError: the announced manifest is not the model's."""
        self.manifest.check(specs)
        self.begin()

    def begin(self) -> None:
        """Start a new update."""
        self._written.clear()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy whole tensors in. :raises WeightSyncError: two names of one tied weight came with different values."""
        for name, tensor in tensors.items():
            owner = self.manifest.aliases.get(name, name)
            tensor = tensor.contiguous()
            for piece in self._pieces[owner]:
                part = piece.source(tensor)
                if owner in self._written:
                    if not torch.equal(piece.target, part.to(piece.target.device, piece.target.dtype)):
                        raise untied(name, owner)
                    continue
                piece.target.copy_(part)
            self._written.add(owner)

    def local(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those flat positions that are on this rank."""
        self.manifest.check_known(list(positions))
        result = {}
        for name, at in positions.items():
            here = torch.zeros(at.shape, dtype=torch.bool)
            for _, index in self._lookups(name, at):
                here |= index >= 0
            result[name] = at[here]
        return result

    def sample(self, positions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Elements at flat positions, on the CPU. :raises WeightSyncError: unknown, or on another rank."""
        self.manifest.check_known(list(positions))
        targets: dict[tuple[str, int], torch.Tensor] = {}
        indices: dict[tuple[str, int], torch.Tensor] = {}
        places: dict[str, list[Any]] = {name: [] for name in positions}
        for name, at in positions.items():
            for piece, index in self._lookups(name, at):
                inside = _ALL if index is at else index >= 0
                key = name, len(places[name])
                targets[key], indices[key] = piece.target, index[inside]
                places[name].append(inside)
        found = take_all_samples(targets, indices)
        return {
            name: self._join(name, at, [(inside, found[name, i]) for i, inside in enumerate(places[name])])
            for name, at in positions.items()
        }

    def _join(self, name: str, at: torch.Tensor, parts: Sequence[tuple[Any, torch.Tensor]]) -> torch.Tensor:
        """One tensor's elements from each piece's (which of the positions ``at``, values)."""
        if len(parts) == 1 and parts[0][0] is _ALL:  # the usual case, without assembling
            values = parts[0][1]
        else:
            values = torch.empty(at.shape, dtype=parts[0][1].dtype if parts else self._dtype)
            here = torch.zeros(at.shape, dtype=torch.bool)
            for inside, part in parts:
                values[inside] = part
                here[inside] = True
            if not here.all():
                raise WeightSyncError(f"{name}: {int((~here).sum())} of the requested elements are on another rank")
        # An engine keeps a few weights always in float32; their values were sent in the engine's dtype.
        return values.to(self._dtype) if values.is_floating_point() else values

    def _lookups(self, name: str, at: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        owner = self.manifest.aliases.get(name, name)
        shape = self.manifest.shapes[owner]
        for piece in self._pieces[owner]:
            yield piece, find_in_piece(piece, shape, at)

    def _check_targets(self, model: torch.nn.Module, padding: set[int], split: bool) -> None:
        """Every hub tensor has a place, every parameter is reached, and all are the model's live parameters."""
        live = {tensor.untyped_storage()._cdata for _, tensor in hub_sources(model)}
        reached = {piece.target.untyped_storage()._cdata for pieces in self._pieces.values() for piece in pieces}
        problems = [f"{name} has no place in it" for name in self._pieces if not (self._pieces[name] or split)]
        if not reached <= live:
            problems.append("some weights were repacked after loading")
        problems += [
            f"its {name} is not filled by any tensor of the hub"
            for name, parameter in model.named_parameters()
            if parameter.untyped_storage()._cdata not in reached | padding
        ]
        if problems:
            raise NotBuiltError(
                f'engine "{self._engine}": the weights of {type(model).__name__} cannot be streamed: '
                f"{'; '.join(problems[:5])}; use --engine_type hf for this model"
            )


def expected_manifest(config: Any) -> Manifest:
    """Hub names and shapes of the model that ``config`` describes, from transformers, on the meta device."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return read_manifest(model, HubLayout(model), dict(hub_sources(model)))


def check_whole(engine: str, shapes: Mapping[str, tuple[int, ...]], held: Sequence[int]) -> None:
    """:param held: number of elements of each tensor of ``shapes`` on all parts of a split model.

    :raises NotBuiltError: some are on none of them.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if lost := [name for name, count, size in zip(shapes, held, sizes, strict=True) if count < size]:
        raise NotBuiltError(
            f'engine "{engine}" loads only a part of {", ".join(lost[:5])}; weights cannot be streamed into it: '
            "use --engine_type hf for this model"
        )


def trace_copies(engine: str, model: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> _CopyRecorder:
    """Run ``model.load_weights`` on meta tensors and record each copy; only zeros are written, into padding.

    :return: by name, its ``pieces`` on this rank; in ``padding`` the storages that nothing was copied to.
    """
    whole = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    recorder = _CopyRecorder(engine, whole)
    with recorder, torch.no_grad():
        model.load_weights(iter(whole.items()))
    return recorder


class _CopyRecorder(TorchDispatchMode):
    """Within it a copy from one of the given meta tensors is recorded instead of made."""

    def __init__(self, engine: str, whole: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._engine = engine
        self._owner = {tensor.untyped_storage()._cdata: name for name, tensor in whole.items()}
        self.pieces: dict[str, list[Piece]] = {}
        self.padding: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func is torch.ops.aten.copy_.default and args[1].device.type == "meta" != args[0].device.type
        if func is torch.ops.aten.copy_.default and not args[0].numel():
            self.padding.add(args[0].untyped_storage()._cdata)
        if not copies:
            return func(*args, **(kwargs or {}))
        target, source = args[0], args[1]
        name = self._owner.get(source.untyped_storage()._cdata)
        if name is None:
            raise NotBuiltError(
                f'engine "{self._engine}": a weight is computed from others while loading, so it cannot be streamed; '
                "use --engine_type hf for this model"
            )
        source = source.expand(target.shape)
        piece = Piece(
            shape=tuple(source.shape),
            stride=tuple(source.stride()),
            offset=int(source.storage_offset()),
            target=target.detach(),
        )
        self.pieces.setdefault(name, []).append(piece)
        return target


def find_in_piece(piece: Piece, shape: tuple[int, ...], at: torch.Tensor) -> torch.Tensor:
    """Flat index into the piece's target of each flat position of the whole tensor; -1 if it is elsewhere.

    :param shape: of the whole tensor. :param at: int64 ``[n]``. :return: int64 ``[n]``.
    """
    numel = math.prod(shape)
    if piece.target.numel() == numel and piece.offset == 0 and _is_contiguous(piece):
        return at
    own = [(size, stride) for size, stride in zip(piece.shape, piece.stride, strict=True) if size > 1]
    strides = [stride for _, stride in own]
    if strides != sorted(strides, reverse=True) or 0 in strides:
        return _find_densely(piece, numel, at)
    # Mixed radix: the position relative to the first element, divided by each stride in turn.
    rest, inside, index = at - piece.offset, at >= piece.offset, torch.zeros_like(at)
    for size, stride in own:
        place = rest.div(stride, rounding_mode="floor")
        inside &= place < size
        index = index * size + place
        rest = rest - place * stride
    inside &= rest == 0
    return torch.where(inside, index, -1)


def _is_contiguous(piece: Piece) -> bool:
    expected = 1
    for size, stride in zip(reversed(piece.shape), reversed(piece.stride), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _find_densely(piece: Piece, numel: int, at: torch.Tensor) -> torch.Tensor:
    """The same for a transposed or repeated part, by a table of the whole tensor."""
    table = torch.full((numel,), -1, dtype=torch.int64)
    count = piece.target.numel()
    table.as_strided(piece.shape, piece.stride, piece.offset).copy_(torch.arange(count).view(piece.shape))
    return table[at]
