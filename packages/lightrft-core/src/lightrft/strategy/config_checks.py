"""What makes a configuration right: types, ranges, and what lies between settings. Every fault is found in one pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import StrategyConfig

Fields = Mapping[str, dataclasses.Field[Any]]
# A rule between settings: their names, and a function that returns a sentence where they do not fit together.
Rule = Callable[["StrategyConfig"], str | None]
RULES: list[tuple[tuple[str, ...], Rule]] = []

ONLY_FSDP = ("use_mp_opt", "fsdp_cpu_offload", "mixed_mm_data")
ONLY_DEEPSPEED = ("zpg", "overlap_comm", "grad_accum_dtype")


def find_faults(
    config: StrategyConfig, fields: Fields, unconverted: Mapping[str, str], world_size: int | None
) -> list[str]:
    """A sentence for each fault.

    :param unconverted: settings whose value could not be converted, with their sentences. They and those out of range
        are left out of the rules between settings, which may rely on the ranges.
    """
    problems = dict(unconverted)
    for name, spec in fields.items():
        value, rule = getattr(config, name), spec.metadata["rule"]
        if name not in unconverted and rule is not None and not rule[0](value):
            problems[name] = f"--{name} {shown(value)}: must be {rule[1]}"
    between = [*RULES, *_backend_rules(fields), *(() if world_size is None else _world_rules(world_size))]
    texts = [rule(config) for names, rule in between if not problems.keys() & set(names)]
    return [*problems.values(), *(text for text in texts if text)]


def between(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule between the named settings."""

    def register(rule: Rule) -> Rule:
        RULES.append((names, rule))
        return rule

    return register


def only_with(
    names: str, parents: str, there: Callable[[StrategyConfig], bool], cure: str
) -> Iterator[tuple[tuple[str, ...], Rule]]:
    """Rules that refuse what was changed from its default and would have no effect.

    :param names: settings, with spaces between them. :param parents: the settings that ``there`` reads, likewise.
    :param there: whether what gives them effect is there. :param cure: the words that complete "works only with ...".
    """

    def refuse(name: str) -> Rule:
        def rule(c: StrategyConfig) -> str | None:
            value = getattr(c, name)
            if value == getattr(type(c), name) or there(c):
                return None
            return f"--{name}{'' if value is True else f' {shown(value)}'}: works only with {cure}"

        return rule

    return (((name, *parents.split()), refuse(name)) for name in names.split())


for _row in (
    ("chunk_size", "fused_linear_logprob", lambda c: c.fused_linear_logprob, "--fused_linear_logprob"),
    ("reward_running_norm_minus_mean", "reward_running_norm", lambda c: c.reward_running_norm, "--reward_running_norm"),
    ("policy_drift_coef", "use_cpg_loss", lambda c: c.use_cpg_loss, "--use_cpg_loss"),
    ("policy_drift_clip_eps", "policy_drift_coef", lambda c: c.policy_drift_coef > 0, "--policy_drift_coef above 0"),
):
    RULES.extend(only_with(*_row))


@between("bf16", "fp16")
def _one_precision(c: StrategyConfig) -> str | None:
    return "--bf16 with --fp16: choose one" if c.bf16 and c.fp16 else None


@between("train_batch_size", "micro_train_batch_size")
def _whole_micro_batches(c: StrategyConfig) -> str | None:
    if c.train_batch_size % c.micro_train_batch_size == 0:
        return None
    return (
        f"--train_batch_size {c.train_batch_size}: must be a multiple of "
        f"--micro_train_batch_size {c.micro_train_batch_size}"
    )


@between("lora_alpha", "lora_dropout", "target_modules", "lora_rank")
def _adapters_need_a_rank(c: StrategyConfig) -> str | None:
    names = [n for n in ("lora_alpha", "lora_dropout", "target_modules") if getattr(c, n) != getattr(type(c), n)]
    changed = [f"--{name} {shown(getattr(c, name))}" for name in names]
    return f"{', '.join(changed)}: works only with --lora_rank above 0" if changed and c.lora_rank == 0 else None


@between("lora_rank", "meta_init")
def _adapters_are_made_in_memory(c: StrategyConfig) -> str | None:
    if c.lora_rank == 0 or not c.meta_init:
        return None
    return f"--lora_rank {c.lora_rank} with --meta_init: adapters cannot be put into models without memory; choose one"


@between("use_gspo", "use_cpg_loss")
def _one_policy_loss(c: StrategyConfig) -> str | None:
    return "--use_gspo with --use_cpg_loss: choose one" if c.use_gspo and c.use_cpg_loss else None


@between("advantage_estimator", "n_samples_per_prompt")
def _groups_to_compare(c: StrategyConfig) -> str | None:
    if c.advantage_estimator not in ("group_norm", "grpo", "dr_grpo", "rloo") or c.n_samples_per_prompt >= 2:
        return None
    return (
        f"--n_samples_per_prompt {c.n_samples_per_prompt}: --advantage_estimator {c.advantage_estimator} compares "
        "samples of one prompt and needs at least 2"
    )


@between("prompt_data_probs", "prompt_data")
def _one_share_a_dataset(c: StrategyConfig) -> str | None:
    if c.prompt_data_probs is None:
        return None
    shares, datasets = len(c.prompt_data_probs.split(",")), len((c.prompt_data or "").split(","))
    if shares == datasets:
        return None
    return f"--prompt_data_probs {c.prompt_data_probs}: {shares} shares for {datasets} datasets"


@between("max_model_len", "prompt_max_len")
def _room_for_a_response(c: StrategyConfig) -> str | None:
    if c.max_model_len is None or c.max_model_len > c.prompt_max_len:
        return None
    return f"--max_model_len {c.max_model_len}: must exceed --prompt_max_len {c.prompt_max_len} to leave room to answer"


@between("zpg", "zero_stage")
def _zpg_needs_stage_3(c: StrategyConfig) -> str | None:
    return f"--zpg {c.zpg}: works only with --zero_stage 3" if c.zpg > 1 and c.zero_stage != 3 else None


@between("grad_accum_dtype", "bf16", "fp16")
def _gradients_accumulate_in_a_dtype_that_is_there(c: StrategyConfig) -> str | None:
    computed = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[c.dtype_name]
    if c.backend != "deepspeed" or c.grad_accum_dtype in (None, "fp32", computed):
        return None
    return (
        f"--grad_accum_dtype {c.grad_accum_dtype}: must be fp32, or {computed}, in which this run computes"
        if computed != "fp32"
        else f"--grad_accum_dtype {c.grad_accum_dtype}: works only with --{c.grad_accum_dtype}; an fp32 run needs fp32"
    )


@between("overlap_comm", "zero_stage", "bf16", "grad_accum_dtype", "adam_offload")
def _overlap_needs_a_reduction_during_backward(c: StrategyConfig) -> str | None:
    widens = c.bf16 and c.grad_accum_dtype in (None, "fp32") and not c.adam_offload
    if not c.overlap_comm or c.backend != "deepspeed" or c.zero_stage != 1 or not widens:
        return None
    return (
        "--overlap_comm with --zero_stage 1 --bf16: DeepSpeed reduces gradients that accumulate in fp32 after the "
        "backward pass there; use --zero_stage 2 or --grad_accum_dtype bf16"
    )


def _backend_rules(fields: Fields) -> Iterator[tuple[tuple[str, ...], Rule]]:
    """Flags of one backend are refused by the other. A zero_stage left over from before is fine."""

    def refuse(name: str, backend: str, other: str) -> Rule:
        def rule(c: StrategyConfig) -> str | None:
            if c.backend != backend or getattr(c, name) == default_of(fields[name]):
                return None
            return f"--{name} {shown(getattr(c, name))}: works only with {other}; the backend is {backend}"

        return rule

    for name in ONLY_FSDP:
        yield (name,), refuse(name, "deepspeed", "--fsdp")
    for name in ONLY_DEEPSPEED:
        yield (name,), refuse(name, "fsdp", "DeepSpeed (without --fsdp)")


def _world_rules(world_size: int) -> Iterator[tuple[tuple[str, ...], Rule]]:
    """What depends on the number of ranks."""
    divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)

    def divides(name: str) -> Rule:
        def rule(c: StrategyConfig) -> str | None:
            size = getattr(c, name)
            if world_size % size == 0:
                return None
            return f"--{name} {size}: must divide the world size {world_size}; possible are {divisors}"

        return rule

    def whole_batches(c: StrategyConfig) -> str | None:
        data_ranks = max(1, world_size // c.sp_size)
        whole = c.micro_train_batch_size * data_ranks
        if c.train_batch_size % whole == 0:
            return None
        return (
            f"--train_batch_size {c.train_batch_size}: must be a multiple of micro_train_batch_size × data ranks = "
            f"{c.micro_train_batch_size} × {data_ranks} = {whole}"
        )

    yield ("engine_tp_size",), divides("engine_tp_size")
    yield ("sp_size",), divides("sp_size")
    yield ("zpg",), divides("zpg")
    yield ("train_batch_size", "micro_train_batch_size", "sp_size"), whole_batches


def convert(cls: type[StrategyConfig], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values converted to their fields' types, and a sentence for each that cannot be (it is left out)."""
    from pydantic import ValidationError

    clean = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
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


@cache
def _adapter(cls: type[StrategyConfig]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def are_shares(text: str | None) -> bool:
    """Whether a text is positive numbers with commas between them."""
    try:
        return text is None or all(0 < float(part) < math.inf for part in text.split(","))
    except ValueError:
        return False


def default_of(spec: dataclasses.Field[Any]) -> Any:
    """A field's default value."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def shown(value: Any) -> str:
    """A value as the user typed it."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return repr(value) if isinstance(value, str) else str(value)
