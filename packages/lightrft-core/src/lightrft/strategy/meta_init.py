"""Fill models that were built on the meta device: from safetensors, or by the modules' own initialisation.

No tensor keeps uninitialised memory. What the pretrained files have stays on the meta device until it is sharded and is
then read directly into each rank's rows; the rest is initialised block by block, with the same values on any number of
ranks. If a parameter cannot be filled, the model refuses to run.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .errors import UnfilledModelError
from .hub_files import pretrained_files
from .hub_layout import HubLayout, hub_models, hub_sources, is_pretrained_model, unwrap

logger = logging.getLogger("lightrft")


@dataclass(kw_only=True)
class FillPlan:
    """How a model on the meta device gets its values.

    :param files: hub name to (file, key in it), for what is read after sharding.
    :param streamed: module tensors that consist of these hub tensors.
    :param unknown: module tensors for which there is neither a file nor an initialisation.
    """

    files: dict[str, tuple[Path, str]] = field(default_factory=dict)
    streamed: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(hub name, whole CPU tensor), one at a time, file by file."""
        for path in sorted({path for path, _ in self.files.values()}):
            with safe_open(path, framework="pt") as file:
                for name, (where, key) in self.files.items():
                    if where == path:
                        yield name, file.get_tensor(key)


def is_meta(model: nn.Module) -> bool:
    """Whether any tensor of the model is on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def plan_fill(model: nn.Module) -> FillPlan:
    """Decide where each meta tensor of an unsharded model gets its value from.

    A transformers model whose configuration names a folder (or a hub name in the local cache) is read from there. One
    whose configuration names none is initialised.
    """
    plan, layout = FillPlan(), HubLayout(model)
    inner = hub_models(model)
    for prefix, module in inner:
        kept = prefix if len(inner) > 1 else ""
        name = getattr(module, "name_or_path", "") or ""
        files = pretrained_files(name)
        mine = {source for source, _ in hub_sources(model) if source.startswith(prefix)}
        if name and not files:
            logger.info("%r is neither a folder with safetensors files nor in the local cache", name)
            plan.unknown |= mine
            continue
        wanted = [hub for source in mine for hub in layout.by_source[source]]
        for hub in wanted:
            for key in _spellings(hub.name.removeprefix(kept), getattr(module, "base_model_prefix", "")):
                if key in files:
                    plan.files[hub.name] = (files[key], key)
                    break
    for source, hubs in layout.by_source.items():
        if hubs and all(hub.name in plan.files for hub in hubs):
            plan.streamed.add(source)
    plan.files = {name: place for name, place in plan.files.items() if layout.by_name[name].source in plan.streamed}
    owners = _initialisers(unwrap(model))
    for path, module in unwrap(model).named_modules():
        if module in owners:
            continue
        names = {f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
        plan.unknown |= names - plan.streamed
    fresh = {name for name, t in hub_sources(model) if t.is_meta} - plan.streamed - plan.unknown
    if plan.streamed and fresh:
        logger.warning("not in the pretrained files, initialised anew: %s", ", ".join(sorted(fresh)))
    return plan


def initialise(
    model: nn.Module, root: nn.Module, plan: FillPlan, seed: int, after: Callable[[nn.Module], None] | None = None
) -> None:
    """Give host memory and values to the meta tensors of ``model``, a part of ``root``, that nothing is streamed into.

    :param after: called with each module once its own tensors have values.
    :raises UnfilledModelError: a module's own initialisation left a tensor out.
    """
    later = plan.streamed | plan.unknown
    owners = _initialisers(unwrap(root))
    names = {id(module): name for name, module in unwrap(root).named_modules()}
    kept_by_id = {id(tensor) for name, tensor in hub_sources(root) if name in later}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            fresh = _materialise_own(module, kept_by_id)
            if fresh:
                # Each module has its own random stream, so that the values do not depend on the units of sharding.
                torch.manual_seed(seed + _stable_hash(names.get(id(module), "")))
                if module in owners:
                    owners[module](module)
                _check_filled(names.get(id(module), ""), fresh)
            if after is not None:
                after(module)


@torch.no_grad()
def materialise(
    model: nn.Module, device: torch.device, rows: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> None:
    """Allocate what is still on the meta device: after sharding, only a rank's rows. Values must follow.

    :param rows: this rank's part of a tensor, sharing its memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            value = torch.empty_like(tensor, device=device)
            rows(value).fill_(_poison(tensor.dtype))
            _swap(tensor, value)


def fill_whole(model: nn.Module, device: torch.device, seed: int) -> FillPlan | None:
    """Allocate and fill, on ``device``, a model that was built on the meta device and stays whole on each rank.

    What the pretrained files hold must follow: see :class:`Unfilled`.

    :return: the plan, or None for a model that is not on the meta device; it is moved to ``device``.
    """
    plan = plan_fill(model) if is_meta(model) else None
    if plan is not None:
        initialise(model, model, plan, seed)
        materialise(model, device)
    model.to(device)
    return plan


class Unfilled:
    """The models that still wait for values and cannot be used before."""

    def __init__(self) -> None:
        self._waiting: weakref.WeakKeyDictionary[nn.Module, tuple[FillPlan, Any]] = weakref.WeakKeyDictionary()

    def expect(self, model: nn.Module, plan: FillPlan | None) -> bool:
        """Whether any values must follow; the model refuses to be called until :meth:`filled`."""
        if plan is None or not (plan.files or plan.unknown):
            return False
        self._waiting[unwrap(model)] = plan, refuse_forward(unwrap(model), plan)
        return True

    def filled(self, model: nn.Module) -> None:
        """Every value has come."""
        _, handle = self._waiting.pop(unwrap(model), (None, None))
        if handle is not None:
            handle.remove()

    def require_none(self, model: nn.Module) -> None:
        """:raises UnfilledModelError: this model still waits for values."""
        if unwrap(model) in self._waiting:
            raise UnfilledModelError(unfilled_message(self._waiting[unwrap(model)][0]))


def refuse_forward(model: nn.Module, plan: FillPlan) -> Any:
    """Make ``model`` raise when it is called, until the handle that this returns is removed."""
    message = unfilled_message(plan)

    def refuse(*_: Any) -> None:
        raise UnfilledModelError(message)

    return model.register_forward_pre_hook(refuse, prepend=True)


def unfilled_message(plan: FillPlan) -> str:
    """An error that says what is missing and what to call."""
    lacking = sorted(plan.unknown or plan.streamed)
    first = lacking[0]
    return (
        f"{len(lacking)} parameters were built on the meta device and have no values, the first is {first}: call "
        "strategy.import_weights(model, tensors) or strategy.load_ckpt, or build the model from a configuration whose "
        "name_or_path is a folder with safetensors files"
    )


def _spellings(name: str, base: str) -> Iterator[str]:
    """A hub name, and the same with or without the base model's prefix, as from_pretrained accepts it."""
    yield name
    if base:
        yield f"{base}.{name}"
        if name.startswith(f"{base}."):
            yield name[len(base) + 1 :]


def _initialisers(model: nn.Module) -> dict[nn.Module, Any]:
    """The function that fills each module's own tensors: its transformers model's initialisation, or its own
    reset_parameters."""
    found: dict[nn.Module, Any] = {}

    def walk(module: nn.Module, initialise: Any) -> None:
        if is_pretrained_model(module):
            initialise = module._init_weights
        own = initialise
        if own is None and callable(reset := getattr(module, "reset_parameters", None)):
            own = lambda _, reset=reset: reset()  # noqa: E731
        if own is not None:
            found[module] = own
        for child in module.children():
            walk(child, initialise)

    walk(model, None)
    return found


def _materialise_own(module: nn.Module, kept: set[int]) -> dict[str, torch.Tensor]:
    """Allocate a module's own meta tensors on the host, filled with a value that no initialisation produces."""
    fresh: dict[str, torch.Tensor] = {}
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.is_meta and id(tensor) not in kept and not hasattr(tensor, "device_mesh"):  # that is FSDP2's shard
            _swap(tensor, torch.full_like(tensor, _poison(tensor.dtype), device="cpu"))
            fresh[name] = tensor
    return fresh


def _check_filled(path: str, fresh: dict[str, torch.Tensor]) -> None:
    for name, tensor in fresh.items():
        poison = _poison(tensor.dtype)
        left = tensor.isnan() if tensor.dtype.is_floating_point else tensor == poison
        if tensor.dtype != torch.bool and bool(left.any()):
            raise UnfilledModelError(
                f"{path}.{name} was built on the meta device and its module's initialisation does not fill it: build "
                "this model without meta_init"
            )


def _poison(dtype: torch.dtype) -> Any:
    """A value that no initialisation produces."""
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).max


@torch.no_grad()
def _swap(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Replace a tensor's data in place: ties and optimizers keep referring to the same object."""
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, value)


def _stable_hash(text: str) -> int:
    total = 0
    for byte in text.encode():
        total = (total * 131 + byte) % 2**31
    return total
