from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.strategy.config import FIELDS, LESS_MEMORY, StrategyConfig, field_groups, read_yaml
from lightrft.strategy.errors import ConfigError
from lightrft.strategy.sampling import SamplingParams

HINTS = typing.get_type_hints(StrategyConfig)
# Around every bound that a rule may have.
WHOLE = [-3, -2, -1, 0, 1, 2, 3, 4, 7, 8, 100, 10_000]
REAL = [-2.0, -1e-9, 0.0, 1e-9, 0.5, 0.992, 1.0, 1.0 + 1e-9, 2.0, 1e8]
TEXTS = ["a", "a,b", "module:function", "é /x"]
# Texts that a rule takes, and those that it refuses: written out, since a rule that takes everything judges nothing.
RULED = {
    "target_modules": (["all-linear", "q_proj", "q_proj,v_proj"], ["", " ", ","]),
    "prompt_data_probs": (["1", "0.7,0.3", "2, 1e-3"], ["", "x", "a,b", "0.7,", "1;2", "-1", "0.5,0", "nan", "1,inf"]),
    "input_template": (["{}", "Q: {}\nA:", '{"a": {}}'], ["", "Q:", "{", "{ }", "{input}"]),
}
# Any text may name a thing that is there, or be meant so. Whether it does is seen elsewhere.
FREE = """strategy engine_type pretrain critic_pretrain reward_pretrain prompt_data prompt_split eval_data eval_split
    input_key label_key images_key system_prompt reward remote_rm_url output_dir log_dir wandb_project wandb_run_name"""


def of_type(name: str) -> list[Any]:
    """Some values of the field's type."""
    hint = HINTS[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    values: list[Any] = [None] if type(None) in typing.get_args(hint) else []
    literals = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if literals:
        return [*values, *typing.get_args(literals[0])]
    if typing.get_origin(hint) is tuple:
        return [(0.0, 0.99), (0.9, 0.95), (0.5, 1.0), (-0.1, 0.5)]
    return values + {bool: [False, True], int: WHOLE, float: REAL, str: TEXTS}[kinds[0]]


def right(name: str) -> list[Any]:
    """Values that the field's own rule accepts; of a text, those that it should."""
    if name in RULED:
        return [*of_type(name)[: type(None) in typing.get_args(HINTS[name])], *RULED[name][0]]
    rule = FIELDS[name].metadata["rule"]
    return [value for value in of_type(name) if rule is None or rule[0](value)]


def wrong(name: str) -> list[Any]:
    """Values of another type, and values of the right type that the field's rule refuses."""
    kinds = typing.get_args(HINTS[name]) or (HINTS[name],)
    values: list[Any] = [object(), {"a": 1}]
    if str not in kinds:
        values += ["nonsense", "1x", ""]
    if typing.get_origin(HINTS[name]) is tuple:
        values += [(0.5,), (0.5, "x")]
    if float in kinds and FIELDS[name].metadata["rule"] is not None:
        values.append(math.nan)
    if name in RULED:
        return values + RULED[name][1]
    return values + [value for value in of_type(name) if value not in right(name)]


def valid_values(name: str) -> st.SearchStrategy[Any]:
    return st.sampled_from(right(name))


def wrong_values(name: str) -> st.SearchStrategy[Any]:
    return st.sampled_from(wrong(name))


def problems_of(config: StrategyConfig, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config.checked(world_size)
    return error.value.problems


@pytest.mark.parametrize("name", [name for name in FIELDS if str in (typing.get_args(HINTS[name]) or (HINTS[name],))])
def test_a_text_is_ruled_or_free(name: str) -> None:
    assert (FIELDS[name].metadata["rule"] is not None) == (name in RULED) != (name in FREE.split())


# ---- one fault -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_value_is_refused_with_its_flag_and_value(name: str) -> None:
    for value in wrong(name):
        [problem] = problems_of(dataclasses.replace(StrategyConfig(), **{name: value}))
        assert problem.startswith(f"--{name} ")
        assert ": " in problem, "what would be right"
        if isinstance(value, (int, float, tuple)) and FIELDS[name].metadata["rule"]:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert f"--{name} {shown}: " in problem


@pytest.mark.parametrize("name", FIELDS)
def test_a_right_value_is_never_called_wrong(name: str) -> None:
    for value in right(name):
        config = dataclasses.replace(StrategyConfig(), **{name: value})
        problems: list[str] = []
        try:
            assert getattr(config.checked(), name) == value
        except ConfigError as error:
            problems = error.problems
        # It may only be refused for how it sits with the other settings.
        between = ("works only with", "multiple of", "to leave room", "needs at least", "shares for")
        assert all(any(words in problem for words in between) for problem in problems), problems


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.just(None), min_size=1, max_size=12), st.data())
@settings(max_examples=60)
def test_all_faults_are_reported_at_once(chosen: dict[str, None], data: st.DataObject) -> None:
    values = {name: data.draw(wrong_values(name), label=name) for name in chosen}
    problems = problems_of(dataclasses.replace(StrategyConfig(), **values))
    named = {problem.split(" ")[0].rstrip(":").removeprefix("--") for problem in problems}
    assert named == set(values)
    assert len(problems) == len(values)


@pytest.mark.parametrize("value", [-2, -1, 0, 1, 50])
def test_a_top_k_is_right_where_sampling_takes_it(value: int) -> None:
    try:
        SamplingParams(top_k=value)
    except ValueError:
        assert problems_of(StrategyConfig(top_k=value)) == [
            f"--top_k {value}: must be -1 or 0 (all tokens), or a positive count"
        ]
    else:
        assert StrategyConfig(top_k=value).checked().top_k == value


@pytest.mark.parametrize("seed", [-1, 0, 2**32 - 1, 2**32, 2**64])
def test_a_seed_is_right_where_torch_and_numpy_take_it(seed: int) -> None:
    if 0 <= seed < 2**32:
        torch.Generator().manual_seed(StrategyConfig(seed=seed).checked().seed)
        numpy.random.RandomState(seed)
        return
    with pytest.raises(ValueError):
        numpy.random.RandomState(seed)
    assert problems_of(StrategyConfig(seed=seed))[0].startswith(f"--seed {seed}: must be between 0 and 4294967295")


def test_several_reward_models_are_named_with_commas() -> None:
    assert StrategyConfig().reward_names == []
    assert StrategyConfig(reward_pretrain="org/a, ./b").reward_names == ["org/a", "./b"]


def test_faults_between_settings_are_reported_with_the_others() -> None:
    config = StrategyConfig(
        bf16=True, fp16=True, train_batch_size=7, micro_train_batch_size=2, engine_mem_util=1.5, use_mp_opt=True, zpg=2
    )
    problems = problems_of(config)
    text = "\n".join(problems)
    for flag in ("--bf16", "--fp16", "--train_batch_size 7", "--engine_mem_util 1.5", "--use_mp_opt", "--zpg 2"):
        assert flag in text
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"bf16": True, "fp16": True}, ["--bf16", "--fp16", "choose one"]),
        ({"train_batch_size": 10, "micro_train_batch_size": 4}, ["--train_batch_size 10", "multiple", "4"]),
        ({"chunk_size": 8}, ["--chunk_size 8", "--fused_linear_logprob"]),
        ({"reward_running_norm_minus_mean": True}, ["--reward_running_norm"]),
        ({"use_gspo": True, "use_cpg_loss": True}, ["--use_gspo", "--use_cpg_loss"]),
        ({"n_samples_per_prompt": 1}, ["--n_samples_per_prompt 1", "group_norm", "at least 2"]),
        ({"prompt_data": "a,b", "prompt_data_probs": "1"}, ["--prompt_data_probs 1", "1 shares for 2"]),
        ({"max_model_len": 10, "prompt_max_len": 10}, ["--max_model_len 10", "--prompt_max_len 10"]),
        ({"use_mp_opt": True}, ["--use_mp_opt", "--fsdp", "deepspeed"]),
        ({"fsdp_cpu_offload": True}, ["--fsdp_cpu_offload", "--fsdp"]),
        ({"fsdp": True, "zpg": 2, "zero_stage": 3}, ["--zpg 2", "DeepSpeed"]),
        ({"fsdp": True, "overlap_comm": True}, ["--overlap_comm", "DeepSpeed"]),
        ({"fsdp": True, "grad_accum_dtype": "fp32"}, ["--grad_accum_dtype", "DeepSpeed"]),
        ({"zpg": 2}, ["--zpg 2", "--zero_stage 3"]),
        ({"lora_alpha": 32.0}, ["--lora_alpha 32.0", "--lora_rank above 0"]),
        ({"target_modules": "q_proj"}, ["--target_modules 'q_proj'", "--lora_rank above 0"]),
        ({"lora_rank": 8, "meta_init": True}, ["--lora_rank 8", "--meta_init"]),
        ({"policy_drift_coef": 0.1}, ["--policy_drift_coef 0.1: works only with --use_cpg_loss"]),
        ({"policy_drift_clip_eps": 0.3}, ["--policy_drift_clip_eps 0.3", "--policy_drift_coef above 0"]),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given_: dict[str, Any], words: list[str]) -> None:
    [problem] = problems_of(StrategyConfig(**given_))
    assert all(word in problem for word in words), problem


# ---- what depends on the world ---------------------------------------------------------------------------------------
@given(world_size=st.integers(1, 64), tp=st.integers(1, 70))
def test_engine_tp_size_must_divide_the_world(world_size: int, tp: int) -> None:
    config = StrategyConfig(engine_tp_size=tp, train_batch_size=world_size)
    if world_size % tp == 0:
        assert config.checked(world_size).engine_tp_size == tp
        return
    [problem] = problems_of(config, world_size)
    assert f"--engine_tp_size {tp}: must divide the world size {world_size}" in problem
    assert problem.endswith(", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0))


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 64))
def test_a_train_batch_must_be_whole_micro_batches_on_every_rank(world_size: int, micro: int, batch: int) -> None:
    config = StrategyConfig(train_batch_size=batch, micro_train_batch_size=micro)
    if batch % (micro * world_size) == 0:
        steps = config.checked(world_size).accumulation_steps(world_size)
        assert steps * micro * world_size == batch
    else:
        assert any("--train_batch_size" in problem for problem in problems_of(config, world_size))


# ---- reading settings ------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Arguments:
    seed: int = 3
    mine: str = "kept"


class Slotted:
    __slots__ = ("seed",)

    def __init__(self) -> None:
        self.seed = 3


class OnTheClass:
    seed, mine = 3, "kept"
    strategy = None

    def resume(self) -> None: ...


class Derived(OnTheClass):
    @property
    def fsdp(self) -> bool:
        return True


class WithKeys:
    """A configuration library's own mapping: what dict() takes."""

    values = types.MappingProxyType({"seed": 3, "mine": "kept"})

    def keys(self) -> Any:
        return self.values.keys()

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __repr__(self) -> str:
        return repr(self.values)


def with_another(args: Any) -> Any:
    args.fsdp = True
    return args


@pytest.mark.parametrize(
    "args",
    [
        argparse.Namespace(seed=3, mine="kept"),
        {"seed": 3, "mine": "kept"},
        Arguments(),
        SimpleNamespace(seed=3, mine="kept"),
        StrategyConfig(seed=3, extra_args={"mine": "kept"}),
        OnTheClass(),
        OnTheClass,
        Derived(),
        WithKeys(),
        SimpleNamespace(seed=3, mine="kept", extra_args="a script's own"),
    ],
    ids=["namespace", "dict", "dataclass", "object", "config", "instance", "class", "derived", "keys", "own"],
)
def test_settings_come_from_any_object(args: Any) -> None:
    before = repr(args)
    config = StrategyConfig.from_args(args)
    assert config.seed == 3
    assert config.get_extra_arg("mine") == "kept"
    assert config.get_extra_arg("absent", 5) == 5
    assert repr(args) == before


def test_an_object_without_a_dict_is_read_by_attribute() -> None:
    assert StrategyConfig.from_args(Slotted()).seed == 3


@pytest.mark.parametrize(
    "args",
    [Derived(), with_another(Arguments()), with_another(OnTheClass())],
    ids=["property", "beside a dataclass's fields", "beside the class's"],
)
def test_a_setting_is_read_wherever_an_object_has_it(args: Any) -> None:
    config = StrategyConfig.from_args(args)
    assert (config.fsdp, config.seed, config.resume) == (True, 3, False)


def test_a_setting_of_ours_is_an_extra_one_for_a_script_that_does_not_know_it() -> None:
    assert StrategyConfig.from_args({"temperature": 0.5}).get_extra_arg("temperature", 1.0) == 0.5


def test_a_path_is_text() -> None:
    config = StrategyConfig.from_args(argparse.Namespace(output_dir=Path("a/b"), log_dir=Path("c"), pretrain=Path("d")))
    assert (config.output_dir, config.log_dir, config.pretrain) == ("a/b", "c", "d")
    assert StrategyConfig(output_dir=Path("a/b")).checked().output_dir == "a/b"  # type: ignore[arg-type]


def test_no_arguments_are_the_defaults() -> None:
    assert StrategyConfig.from_args(None) == StrategyConfig()


def test_what_holds_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="Namespace"):
        StrategyConfig.from_args(5)


def test_text_becomes_the_fields_type() -> None:
    config = StrategyConfig.from_args({"seed": "7", "max_norm": "0.5", "bf16": "true", "adam_betas": [0.5, 0.6]})
    assert (config.seed, config.max_norm, config.bf16, config.adam_betas) == (7, 0.5, True, (0.5, 0.6))


def test_values_that_cannot_be_converted_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        StrategyConfig.from_args({"seed": "x", "max_norm": "y", "bf16": True})
    assert [problem.split(" ")[0] for problem in error.value.problems] == ["--seed", "--max_norm"]


def test_construction_checks_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    StrategyConfig(seed=-5, bf16=True, fp16=True)
    assert capsys.readouterr() == ("", "")


def test_types_are_those_that_the_documents_promise() -> None:
    config = StrategyConfig.from_args({"actor_learning_rate": 1, "bf16": 0})
    assert isinstance(config.actor_learning_rate, float)
    assert isinstance(config.bf16, bool)


@given(st.data())
@settings(max_examples=60)
def test_yaml_gives_back_what_went_in(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=8))
    config = StrategyConfig(**{name: data.draw(valid_values(name), label=name) for name in names})
    loaded = StrategyConfig.from_args(yaml.safe_load(config.to_yaml()))
    for name in FIELDS:
        mine, theirs = getattr(config, name), getattr(loaded, name)
        assert mine == theirs or (isinstance(mine, float) and math.isclose(mine, theirs)), name


def test_a_yaml_file_holds_every_setting_in_its_group(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    StrategyConfig(seed=5).to_yaml(path)
    text = path.read_text()
    assert list(yaml.safe_load(text)) == [name for names in field_groups().values() for name in names]
    assert [line[2:] for line in text.splitlines() if line.startswith("# ")] == list(field_groups())
    assert StrategyConfig.from_yaml(path) == StrategyConfig(seed=5)


def test_unknown_yaml_keys_are_all_named_with_the_nearest_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sed: 1\nengine_typ: hf\nxyzzy: 2\nseed: 3\n")
    with pytest.raises(ConfigError) as error:
        StrategyConfig.from_yaml(path)
    problems = error.value.problems
    assert len(problems) == 3
    assert "'sed'" in problems[0]
    assert "seed" in problems[0]
    assert "engine_type" in problems[1]
    assert "--help" in problems[2]
    assert all(str(path) in problem for problem in problems)


@pytest.mark.parametrize(("text", "words"), [("- 1\n- 2\n", "mapping"), ("a: [1\n", "not YAML"), ("", None)])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str, words: str | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    if words is None:
        assert read_yaml(path) == {}
        return
    with pytest.raises(ConfigError, match=words):
        read_yaml(path)


def test_a_files_unknown_keys_and_wrong_values_are_named_together(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sed: 3\nseed: many\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert ["'sed'" in text for text in caught.value.problems] == [True, False]
    assert "--seed 'many'" in caught.value.problems[1]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        read_yaml(tmp_path / "absent.yaml")


# ---- the documents ---------------------------------------------------------------------------------------------------
def test_defaults_are_the_documents() -> None:
    config = StrategyConfig()
    assert config.seed == 42
    assert config.zero_stage == 2
    assert config.engine_type == "vllm"
    assert config.enable_engine_sleep
    assert not config.fsdp
    assert config.backend == "deepspeed"


@pytest.mark.parametrize(
    ("given_", "backend"),
    [
        ({}, "deepspeed"),
        ({"zero_stage": 3}, "deepspeed"),
        ({"fsdp": True}, "fsdp"),
        ({"fsdp": True, "zero_stage": 2}, "fsdp"),
        ({"strategy": "mine", "fsdp": True}, "mine"),
    ],
)
def test_the_backend_follows_the_documents_rules(given_: dict[str, Any], backend: str) -> None:
    assert StrategyConfig(**given_).checked().backend == backend


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        ({}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"use_mp_opt": True, "fsdp": True}, "bfloat16"),
    ],
)
def test_precision_follows_its_flags(given_: dict[str, Any], name: str) -> None:
    assert StrategyConfig(**given_).checked().dtype_name == name


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_help_text_a_group_and_a_valid_default(name: str) -> None:
    spec = FIELDS[name]
    assert spec.metadata["help"].endswith(".")
    assert spec.metadata["group"] in field_groups()
    rule = spec.metadata["rule"]
    assert rule is None or rule[0](spec.default)


def test_errors_are_value_errors_and_keep_their_problems_apart() -> None:
    error = ConfigError(["one", "two"])
    assert isinstance(error, ValueError)
    assert str(error) == "2 settings are wrong:\n  - one\n  - two"
    assert str(ConfigError(["one"])).startswith("1 setting is wrong:")


def test_flags_that_lower_the_memory_are_flags() -> None:
    assert {flag.removeprefix("--") for flag in LESS_MEMORY.split(", ")} <= set(HINTS)
