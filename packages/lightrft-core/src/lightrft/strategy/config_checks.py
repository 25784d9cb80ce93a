"""What makes a configuration right: types, ranges, and rules between settings. Every fault is found in one pass."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import StrategyConfig

# Returns a sentence where the settings do not fit together.
Rule = Callable[["StrategyConfig"], str | None]


class Rules:
    """Rules between settings, each with the names of the settings that it reads."""

    def __init__(self) -> None:
        self._rules: list[tuple[tuple[str, ...], Rule]] = []

    def between(self, *names: str) -> Callable[[Rule], Rule]:
        """Add a rule that reads the named settings. A decorator."""

        def add(rule: Rule) -> Rule:
            self._rules.append((names, rule))
            return rule

        return add

    def only_with(self, names: str, parents: str, there: Callable[[StrategyConfig], bool], cure: str) -> None:
        """Refuse settings that were changed from their defaults and would have no effect.

        :param names: the settings, separated by spaces. :param parents: the settings that ``there`` reads, likewise.
        :param there: whether the settings have an effect. :param cure: completes "works only with ...".
        """

        def refuse(name: str) -> Rule:
            def rule(c: StrategyConfig) -> str | None:
                value = getattr(c, name)
                if value == getattr(type(c), name) or there(c):
                    return None
                return f"--{name}{'' if value is True else f' {shown(value)}'}: works only with {cure}"

            return rule

        for name in names.split():
            self._rules.append(((name, *parents.split()), refuse(name)))

    def faults(self, config: StrategyConfig, wrong: Collection[str]) -> list[str]:
        """A sentence for each rule that does not hold.

        :param wrong: settings that are wrong by themselves. Rules that read them are left out, for they may rely on the
            ranges.
        """
        texts = [rule(config) for names, rule in self._rules if not set(names) & set(wrong)]
        return [text for text in texts if text]


RULES = Rules()


def find_faults(config: StrategyConfig, unconverted: Mapping[str, str], world_size: int | None) -> list[str]:
    """A sentence for each fault.

    :param unconverted: sentences for the settings whose values could not be converted, by name.
    """
    wrong = {**unconverted, **out_of_range(config, unconverted)}
    found = [*wrong.values(), *RULES.faults(config, wrong)]
    return found if world_size is None else found + _world_rules(world_size).faults(config, wrong)


def out_of_range(config: StrategyConfig, unconverted: Collection[str] = ()) -> dict[str, str]:
    """A sentence for each setting whose value breaks its own rule, by name."""
    found = {}
    for spec in dataclasses.fields(config):
        value, rule = getattr(config, spec.name), spec.metadata.get("rule")
        if rule is not None and spec.name not in unconverted and not rule[0](value):
            found[spec.name] = f"--{spec.name} {shown(value)}: must be {rule[1]}"
    return found


def indivisible(name: str, size: int, world_size: int) -> str | None:
    """A sentence where ``size`` does not divide the number of ranks; names the sizes that do."""
    if size >= 1 and world_size % size == 0:
        return None
    divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
    return f"--{name} {size}: must divide the world size {world_size}; possible are {divisors}"


RULES.only_with("chunk_size", "fused_linear_logprob", lambda c: c.fused_linear_logprob, "--fused_linear_logprob")
RULES.only_with(
    "reward_running_norm_minus_mean", "reward_running_norm", lambda c: c.reward_running_norm, "--reward_running_norm"
)
RULES.only_with("policy_drift_coef", "use_cpg_loss", lambda c: c.use_cpg_loss, "--use_cpg_loss")
RULES.only_with(
    "policy_drift_clip_eps", "policy_drift_coef", lambda c: c.policy_drift_coef > 0, "--policy_drift_coef above 0"
)
RULES.only_with("lora_alpha lora_dropout target_modules", "lora_rank", lambda c: c.lora_rank > 0, "--lora_rank above 0")
# zero_stage is not listed: with FSDP a value left over from a DeepSpeed run does no harm.
RULES.only_with(
    "use_mp_opt fsdp_cpu_offload mixed_mm_data",
    "strategy fsdp",
    lambda c: c.backend != "deepspeed",
    "--fsdp; the backend is deepspeed",
)
RULES.only_with(
    "zpg overlap_comm grad_accum_dtype",
    "strategy fsdp",
    lambda c: c.backend != "fsdp",
    "DeepSpeed (without --fsdp); the backend is fsdp",
)


@RULES.between("bf16", "fp16")
def _one_precision(c: StrategyConfig) -> str | None:
    return "--bf16 with --fp16: choose one" if c.bf16 and c.fp16 else None


@RULES.between("train_batch_size", "micro_train_batch_size")
def _whole_micro_batches(c: StrategyConfig) -> str | None:
    if c.train_batch_size % c.micro_train_batch_size == 0:
        return None
    return (
        f"--train_batch_size {c.train_batch_size}: must be a multiple of "
        f"--micro_train_batch_size {c.micro_train_batch_size}"
    )


@RULES.between("lora_rank", "meta_init")
def _adapters_are_made_in_memory(c: StrategyConfig) -> str | None:
    if c.lora_rank == 0 or not c.meta_init:
        return None
    return f"--lora_rank {c.lora_rank} with --meta_init: no adapters for models on the meta device; choose one"


@RULES.between("use_gspo", "use_cpg_loss")
def _one_policy_loss(c: StrategyConfig) -> str | None:
    return "--use_gspo with --use_cpg_loss: choose one" if c.use_gspo and c.use_cpg_loss else None


@RULES.between("advantage_estimator", "n_samples_per_prompt")
def _groups_to_compare(c: StrategyConfig) -> str | None:
    if c.advantage_estimator not in ("group_norm", "grpo", "dr_grpo", "rloo") or c.n_samples_per_prompt >= 2:
        return None
    return (
        f"--n_samples_per_prompt {c.n_samples_per_prompt}: --advantage_estimator {c.advantage_estimator} compares "
        "the samples of a prompt and needs at least 2"
    )


@RULES.between("prompt_data_probs", "prompt_data")
def _one_share_a_dataset(c: StrategyConfig) -> str | None:
    if c.prompt_data_probs is None:
        return None
    shares, datasets = len(c.prompt_data_probs.split(",")), len((c.prompt_data or "").split(","))
    if shares == datasets:
        return None
    return f"--prompt_data_probs {c.prompt_data_probs}: names {shares} shares for {datasets} datasets"


@RULES.between("max_model_len", "prompt_max_len")
def _room_for_a_response(c: StrategyConfig) -> str | None:
    if c.max_model_len is None or c.max_model_len > c.prompt_max_len:
        return None
    return (
        f"--max_model_len {c.max_model_len}: must exceed --prompt_max_len {c.prompt_max_len} to leave room to respond"
    )


@RULES.between("zpg", "zero_stage")
def _zpg_needs_stage_3(c: StrategyConfig) -> str | None:
    return f"--zpg {c.zpg}: works only with --zero_stage 3" if c.zpg > 1 and c.zero_stage != 3 else None


@RULES.between("grad_accum_dtype", "bf16", "fp16")
def _gradients_accumulate_in_a_dtype_that_is_there(c: StrategyConfig) -> str | None:
    computed = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[c.dtype_name]
    if c.backend != "deepspeed" or c.grad_accum_dtype in (None, "fp32", computed):
        return None
    return (
        f"--grad_accum_dtype {c.grad_accum_dtype}: must be fp32 or {computed}, the dtype of this run"
        if computed != "fp32"
        else f"--grad_accum_dtype {c.grad_accum_dtype}: works only with --{c.grad_accum_dtype}; an fp32 run needs fp32"
    )


@RULES.between("overlap_comm", "zero_stage", "bf16", "grad_accum_dtype", "adam_offload")
def _overlap_needs_a_reduction_during_backward(c: StrategyConfig) -> str | None:
    widens = c.bf16 and c.grad_accum_dtype in (None, "fp32") and not c.adam_offload
    if not c.overlap_comm or c.backend != "deepspeed" or c.zero_stage != 1 or not widens:
        return None
    return (
        "--overlap_comm with --zero_stage 1 --bf16: with gradients in fp32, DeepSpeed reduces them only after "
        "the backward pass; use --zero_stage 2 or --grad_accum_dtype bf16"
    )


def _world_rules(world_size: int) -> Rules:
    """What depends on the number of ranks."""
    rules = Rules()
    for size in ("engine_tp_size", "sp_size", "zpg"):
        rules.between(size)(lambda c, size=size: indivisible(size, getattr(c, size), world_size))

    @rules.between("train_batch_size", "micro_train_batch_size", "sp_size")
    def _whole_batches(c: StrategyConfig) -> str | None:
        data_ranks = max(1, world_size // c.sp_size)
        whole = c.micro_train_batch_size * data_ranks
        if c.train_batch_size % whole == 0:
            return None
        return (
            f"--train_batch_size {c.train_batch_size}: must be a multiple of micro_train_batch_size × data ranks = "
            f"{c.micro_train_batch_size} × {data_ranks} = {whole}"
        )

    return rules


def convert(cls: type[StrategyConfig], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values converted to their fields' types, and a sentence for each that cannot be (it is left out)."""
    from pydantic import ValidationError

    clean = {key: _simple(value) for key, value in values.items()}
    problems: dict[str, str] = {}
    adapter = _adapter(cls)
    try:
        adapter.validate_python(clean)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            name = str(item["loc"][0])
            problems.setdefault(name, f"--{name} {shown(values[name])}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    clean = {key: value for key, value in clean.items() if key not in problems}
    validated = adapter.validate_python(clean)
    return {name: getattr(validated, name) for name in clean}, problems


def _simple(value: Any) -> Any:
    """A list as a tuple, a path as text."""
    return tuple(value) if isinstance(value, list) else os.fspath(value) if isinstance(value, os.PathLike) else value


@cache
def _adapter(cls: type[StrategyConfig]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def are_shares(text: str | None) -> bool:
    """Whether a text is positive numbers separated by commas. None passes: no shares were given."""
    try:
        return text is None or all(0 < float(part) < math.inf for part in text.split(","))
    except ValueError:
        return False


def shown(value: Any) -> str:
    """A value as the user typed it."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return repr(value) if isinstance(value, str) else str(value)
