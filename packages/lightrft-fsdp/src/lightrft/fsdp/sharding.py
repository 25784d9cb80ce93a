"""Which modules are gathered together, and how they are sharded.

The units are the model's blocks: for a transformers model its ``_no_split_modules``, else the elements of every list of
like modules. The rest belongs to the units of the transformers model itself and of the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightrft.strategy.hub_layout import hub_models, is_pretrained_model

# Number of elements from which a token embedding gets its own collectives: 64 MiB in fp32.
LARGE_EMBEDDING = 2**24


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Modules that are gathered, computed and freed as one.

    :param name: the module's path; "" is the root.
    :param stays: keep it gathered between forward and backward, because backward starts with it.
    :param may_idle: some of its parameters may get no data on some ranks (routed experts, a vision tower): their
        gradients are reduced as zeros there, since all ranks must reduce the same sizes.
    :param forward_only: its backward pass does not need its parameters.
    """

    name: str
    module: nn.Module
    stays: bool = False
    may_idle: bool = False
    forward_only: bool = False


def plan_units(model: nn.Module, *, mixed_mm_data: bool = False) -> list[Unit]:
    """The units of a model, children before parents, the root last. Pure: no process group is needed.

    :param mixed_mm_data: batches of some ranks may have no image. A vision tower that does not run then may not have
        its own collectives: its parameters are gathered with the transformers model around it.
    """
    holders = _holders(model)
    units: list[Unit] = []
    outer, inside = "", model  # what a wrapper has as .module
    while isinstance(inner_module := getattr(inside, "module", None), nn.Module):
        outer, inside = f"{outer}module.", inner_module

    def add(name: str, module: nn.Module) -> None:
        if _owns_its_parameters(name, module, holders):
            units.append(Unit(name=name, module=module, may_idle=_routes(module)))

    inner = {outer + prefix: module for prefix, module in hub_models(model)}
    for prefix, module in inner.items():
        towers = _towers(module)
        for name, block in _blocks(module, skip=towers if mixed_mm_data else []):
            add(prefix + name, block)
        name, embedding = _lone_embedding(module, [unit.module for unit in units])
        if embedding is not None and _owns_its_parameters(prefix + name, embedding, holders):
            units.append(Unit(name=prefix + name, module=embedding, forward_only=True))
        if module is not model:
            may_idle = mixed_mm_data and bool(towers)
            units.append(Unit(name=prefix.rstrip("."), module=module, stays=True, may_idle=may_idle))
    for name, block in _listed_blocks(model, skip=list(inner.values())):
        add(name, block)
    root_towers = mixed_mm_data and any(_towers(module) for module in inner.values() if module is model)
    return [*units, Unit(name="", module=model, stays=True, may_idle=root_towers or _routes_outside(model, units))]


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    units: list[Unit],
    *,
    trains: bool,
    param_dtype: torch.dtype | None,
    master_dtype: torch.dtype | None,
    offload: bool,
    before: Callable[[Unit], None] = lambda unit: None,
) -> None:
    """Shard ``model`` in place over ``mesh``, unit by unit, so that only one at a time is whole in another dtype.

    :param trains: a frozen model is always freed after forward, since no backward pass follows.
    :param param_dtype: compute in it; None: in the parameters' own.
    :param master_dtype: hold trainable parameters in it; None: in their own.
    :param offload: keep the shards and their gradients in host memory.
    :param before: called with each unit while its own parameters are still whole.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    host = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    alone = mesh.size(mesh.ndim - 1) == 1  # nothing to free: every rank has all rows
    for unit in units:
        before(unit)
        cast_trainable(unit.module, master_dtype)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": host}
        fully_shard(unit.module, **options, reshard_after_forward=not (alone or (unit.stays and trains)))
        assert isinstance(unit.module, FSDPModule)
        if unit.may_idle:
            unit.module.set_reduce_scatter_unused_params(True, recurse=False)
        if unit.forward_only:
            unit.module.set_unshard_in_backward(False)


@torch.no_grad()
def cast_trainable(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Hold the trainable parameters that are not sharded yet in ``dtype``; None leaves them."""
    for parameter in module.parameters():
        if dtype is None or not parameter.requires_grad or isinstance(parameter, DTensor):
            continue
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def finish_sharding(model: nn.Module) -> None:
    """Make ``model`` the root, and reshard after every forward pass without gradients."""
    assert isinstance(model, FSDPModule)
    # torch takes the first module that runs as the root; if that is the transformers model inside an actor, it
    # refuses the actor later. There is no public way to choose the root.
    model._get_fsdp_state()._lazy_init()

    def reshard(module: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled():
            module.reshard()  # type: ignore[operator]

    for module in sharded_modules(model):
        module.register_forward_hook(reshard)  # type: ignore[attr-defined]


def make_mesh(device: torch.device, world_size: int, shard_size: int) -> DeviceMesh:
    """One axis over all ranks, or (replicate, shard) if a model is sharded over fewer. Every rank must call."""
    if shard_size == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module that ``fully_shard`` was applied to."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# ---- finding units ---------------------------------------------------------------------------------------------------
def _blocks(model: nn.Module, skip: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost of a transformers model's ``_no_split_modules``; else the elements of its module lists."""
    names: set[str] = set()
    for module in model.modules():
        if is_pretrained_model(module):
            names.update(getattr(module, "_no_split_modules", None) or ())
    found = list(_outermost(model, lambda module: type(module).__name__ in names, skip))
    return iter(found) if found else _listed_blocks(model, skip)


def _listed_blocks(model: nn.Module, skip: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Elements of every outermost list of two or more like modules."""
    for name, modules in _outermost(model, _is_list_of_likes, skip):
        for key, child in modules.named_children():
            yield f"{name}.{key}" if name else key, child


def _outermost(model: nn.Module, wanted: Any, skip: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if any(child is other for other in skip):
                continue
            here = f"{path}.{name}" if path else name
            if wanted(child):
                yield here, child
            else:
                yield from walk(child, here)

    if any(model is other for other in skip):
        return iter(())
    return iter([("", model)]) if wanted(model) else walk(model, "")


def _is_list_of_likes(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    return len({type(child) for child in module}) == 1 and all(_has_parameters(child) for child in module)


def _routes(module: nn.Module) -> bool:
    """Whether a block selects from a list of like modules (experts that are not stacked)."""
    return any(_is_list_of_likes(child) for child in module.modules() if child is not module)


def _routes_outside(model: nn.Module, units: list[Unit]) -> bool:
    """Whether the root has a list of like modules, none of which became a unit."""
    taken = {id(module) for unit in units for module in unit.module.modules()}
    lists = [module for module in model.modules() if _is_list_of_likes(module)]
    return any(not any(id(child) in taken for child in module.children()) for module in lists)


def _towers(model: nn.Module) -> list[nn.Module]:
    """Outermost transformers models inside ``model`` without its token embedding: those that process images."""
    embedding = _token_embedding(model)

    def is_tower(module: nn.Module) -> bool:
        return is_pretrained_model(module) and not any(part is embedding for part in module.modules())

    return [module for _, module in _outermost(model, is_tower, [])] if embedding is not None else []


def _token_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _lone_embedding(model: nn.Module, blocks: list[nn.Module]) -> tuple[str, nn.Module | None]:
    """A large token embedding outside all blocks, and its name: backward does not need it gathered."""
    embedding = _token_embedding(model)
    if type(embedding) is not nn.Embedding or embedding.weight.numel() < LARGE_EMBEDDING:
        return "", None
    if any(part is embedding for block in blocks for part in block.modules()):
        return "", None
    return next(name for name, module in model.named_modules() if module is embedding), embedding


def _holders(model: nn.Module) -> dict[int, set[str]]:
    """All paths of each parameter."""
    holders: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), set()).add(name)
    return holders


def _owns_its_parameters(name: str, module: nn.Module, holders: dict[int, set[str]]) -> bool:
    """A parameter that is tied to another part of the model must stay with what holds both."""
    return _has_parameters(module) and all(
        path.startswith(f"{name}.") for parameter in module.parameters() for path in holders[id(parameter)]
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
