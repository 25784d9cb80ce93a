"""LoRA adapters, through peft: add them to a model, compute without them, save them in peft's format."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lightrft.strategy.adapters import count_owners, is_adapted, without_adapters
from lightrft.strategy.disk import explain_write, settle, staging_for
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.hub_layout import hub_models, unwrap
from lightrft.strategy.tensor_files import write_tensors
from lightrft.strategy.weights import UpdatePlan

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase

ALL_LINEAR = "all-linear"
NAME = "default"  # peft's default name of an adapter


def add_adapters(
    model: Any,
    kind: Literal["generator", "backbone"],
    *,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: str = ALL_LINEAR,
) -> None:
    """Freeze a transformers model and add trainable adapters to its linear layers, in place.

    They are always in fp32, add 0 at first, and start with the same values in every model of this process: A is drawn
    from the run's seed, B is 0.

    :param alpha: adapters are scaled by ``alpha / rank``. :param dropout: of their input, in train mode.
    :param target_modules: "all-linear" (all that can be adapted, except the output layer), or last parts of layers'
        names, separated by commas.
    :raises ValueError: peft is not installed, a name is not that of a linear layer that can be adapted, or the model is
        on the meta device.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"--lora_rank {rank}: LoRA needs peft, which is not installed; pip install 'lightrft-trainer[lora]'"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"--lora_rank {rank}: adapters cannot be added to a model on the meta device; drop --meta_init"
        )
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - any number: it is divided by the rank
        lora_dropout=dropout,
        target_modules=_layers(model, target_modules),
        task_type=TaskType.CAUSAL_LM if kind == "generator" else TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        try:
            inject_adapter_in_model(config, model, NAME)
        except ValueError as error:  # such as layers of which a kernel takes the weight alone
            names = ", ".join(sorted({name.rpartition(".")[2] for name in config.target_modules or ()}))
            raise ValueError(f"--target_modules {target_modules}: {error} Name others of {names}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _layers(model: Any, wanted: str) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A router may be a linear layer that returns more than a product; a shared weight has only one name on the hub.
    owners = count_owners(model)
    linear = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
        and type(m).forward is nn.Linear.forward
        and owners[id(m.weight)] == 1
        and m is not output
    ]
    if not linear:
        raise ValueError(
            f"--lora_rank: {type(model).__name__} has no linear layer to adapt; drop the flag to train it all"
        )
    mistaken = _mistaken_for_experts(model, linear)
    linear = [name for name in linear if name not in mistaken]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if wanted.strip().lower() == ALL_LINEAR:
        names = [""]
    chosen: set[str] = set()
    for name in names:
        found = {layer for layer in linear if f".{layer}".endswith(f".{name}" if name else "")}
        if not found:
            possible = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear})) or "none"
            stacked = [path for path, p in model.named_parameters() if p.ndim == 3 and f".{name}." in f".{path}."]
            why = "has no such linear layer"
            if stacked:
                why = f"stacks its experts in {stacked[0]}, which gets no adapter"
            elif any(f".{layer}".endswith(f".{name}") for layer in mistaken):
                why = "stacks its experts, for which peft takes this name, and they get no adapter"
            raise ValueError(
                f"--target_modules {name or ALL_LINEAR}: {type(model).__name__} {why}; possible are {ALL_LINEAR}, "
                f"or of {possible}"
            )
        chosen |= found
    return sorted(chosen)


def _mistaken_for_experts(model: Any, layers: list[str]) -> set[str]:
    """Layers that peft would leave for the stacked experts, whatever their full names are.

    Models whose experts transformers 5 stacks have other layers, such as shared experts, of the same last names. peft
    changes those names to the experts' parameters, when adapters are added and when a saved one is loaded.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=layers)
    convert_peft_config_for_transformers(config, model, None)
    return set(layers) - set(config.target_modules or ())


def has_adapters(model: nn.Module) -> bool:
    """Whether the model, prepared or not, trains adapters."""
    return any(is_adapted(module) for module in model.modules())


class WithoutAdapters:
    """The original model of an adapted one: the same module without its adapters, which needs no memory.

    It is called like that module, without gradients and dropout.

    :param module: an adapted model, as the strategy prepared it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trains = self.module.training
        self.module.eval()
        try:
            with without_adapters(unwrap(self.module)):
                return self.module(*args, **kwargs)
        finally:
            self.module.train(trains)


def save_adapter(strategy: StrategyBase, model: nn.Module, folder: str | Path) -> None:
    """Write a model's adapters for ``PeftModel.from_pretrained(base, folder)``. Every rank calls.

    The folder appears only when complete; other files of an existing one stay.

    :param model: prepared by ``strategy``.
    :raises ValueError: it has no adapters.
    :raises CheckpointError: rank 0 could not write; raised on every rank.
    """
    specs = tuple(strategy.export_spec(model, "adapter"))
    if not specs:
        raise ValueError("save_adapter: the model has no LoRA adapters; use save_model")
    folder = Path(folder).resolve()
    staging = staging_for(folder)
    plan = UpdatePlan(version=0, kind="adapter", specs=specs)
    tensors: dict[str, torch.Tensor] = {}
    with strategy.together("save_adapter", CheckpointError):
        for bucket in strategy.export_weights(model, plan):
            if strategy.is_rank_0():
                tensors |= {name: t.to("cpu", copy=True).contiguous() for name, t in bucket.tensors.items()}
        if strategy.is_rank_0():
            try:
                with explain_write(staging, folder, sum(spec.nbytes for spec in specs)):
                    shutil.rmtree(staging, ignore_errors=True)
                    staging.mkdir(parents=True)
                    write_tensors(staging / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
                    _peft_config(model).save_pretrained(str(staging))
                    settle(staging, folder, stale=(), last="adapter_config.json")
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def _peft_config(model: nn.Module) -> Any:
    ((_, inner),) = hub_models(model)
    config = copy.copy(getattr(inner, "peft_config")[NAME])  # noqa: B009 - not an attribute that nn.Module declares
    config.inference_mode = True
    return config
