from __future__ import annotations

import argparse

import pytest

from lightrft.strategy.config import FIELDS, StrategyConfig, field_groups
from lightrft.utils import add_arguments

# Every flag of the usage guide, with a value that it shows or allows.
DOCUMENTED = {
    "--engine_tp_size": ("4", 4),
    "--engine_mem_util": ("0.85", 0.85),
    "--engine_type": ("vllm", "vllm"),
    "--zero_stage": ("3", 3),
    "--sp_size": ("2", 2),
    "--chunk_size": ("4096", 4096),
    "--log_dir": ("./logs", "./logs"),
    "--plot_every": ("10", 10),
    "--micro_train_batch_size": ("1", 1),
    "--train_batch_size": ("128", 128),
    "--micro_rollout_batch_size": ("4", 4),
}
DOCUMENTED_SWITCHES = [
    "--fsdp",
    "--fsdp_cpu_offload",
    "--adam_offload",
    "--packing_samples",
    "--use_mp_opt",
    "--fused_linear_logprob",
    "--bf16",
    "--mixed_mm_data",
    "--enable_engine_sleep",
]


def parse(*words: str, **keywords: bool) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser(), **keywords).parse_args(words)


def test_without_flags_every_default_is_the_configurations() -> None:
    assert StrategyConfig.from_args(parse()) == StrategyConfig()


@pytest.mark.parametrize("flag", DOCUMENTED)
def test_a_documented_flag_takes_its_value(flag: str) -> None:
    text, value = DOCUMENTED[flag]
    assert getattr(parse(flag, text), flag.removeprefix("--")) == value


@pytest.mark.parametrize("flag", DOCUMENTED_SWITCHES)
def test_a_documented_switch_turns_on(flag: str) -> None:
    assert getattr(parse(flag), flag.removeprefix("--")) is True


def test_the_engines_sleep_has_one_destination() -> None:
    assert parse().enable_engine_sleep is True
    assert parse("--disable_engine_sleep").enable_engine_sleep is False
    assert parse("--disable_engine_sleep", "--enable_engine_sleep").enable_engine_sleep is True
    assert not hasattr(parse("--disable_engine_sleep"), "disable_engine_sleep")


@pytest.mark.parametrize("name", [name for name, spec in FIELDS.items() if isinstance(spec.default, bool)])
def test_every_switch_can_be_turned_off_again(name: str) -> None:
    negative = "--disable_engine_sleep" if name == "enable_engine_sleep" else f"--no_{name}"
    assert getattr(parse(f"--{name}", negative), name) is False


def test_there_is_a_flag_for_every_setting_and_for_nothing_else() -> None:
    assert set(vars(parse())) == set(FIELDS)


def test_suppressed_defaults_leave_only_what_was_typed() -> None:
    assert vars(parse("--seed", "3", "--fsdp", suppress_defaults=True)) == {"seed": 3, "fsdp": True}


def test_a_flag_that_the_script_has_already_is_left_alone() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=str, default="mine")
    add_arguments(parser)
    assert parser.parse_args([]).seed == "mine"
    assert parser.parse_args([]).zero_stage == 2


@pytest.mark.parametrize("flag", ["--disable_engine_sleep", "--no_fsdp"])
def test_a_switchs_other_half_that_the_script_has_already_is_left_alone(flag: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(flag, dest="mine", action="store_true")
    args = add_arguments(parser).parse_args([flag, "--enable_engine_sleep", "--fsdp"])
    assert (args.mine, args.enable_engine_sleep, args.fsdp) == (True, True, True)


def test_a_value_of_another_type_is_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--seed", "x"], ["--kl_estimator", "k9"], ["--adam_betas", "0.9"]):
        with pytest.raises(SystemExit):
            parse(*words)
        assert words[0] in capsys.readouterr().err


def test_pairs_are_two_words() -> None:
    assert StrategyConfig.from_args(parse("--adam_betas", "0.5", "0.6")).adam_betas == (0.5, 0.6)


def test_help_shows_every_setting_in_its_group() -> None:
    text = add_arguments(argparse.ArgumentParser()).format_help()
    assert all(f"--{name}" in text for name in FIELDS)
    assert all(f"{group}:" in text for group in field_groups())


def test_help_shows_every_default_that_is_one() -> None:
    flags = add_arguments(argparse.ArgumentParser())._option_string_actions
    for name, spec in FIELDS.items():
        shown = "(default: " in (flags[f"--{name}"].help or "")
        assert shown == (spec.default is not None and spec.default is not False), name
    assert "(default: 0)" in (flags["--lora_rank"].help or "")
    assert "(default: 0.0)" in (flags["--min_p"].help or "")


@pytest.mark.parametrize(
    "command",
    [
        """--zero_stage 2 --engine_tp_size 4 --engine_mem_util 0.9 --enable_engine_sleep
        --micro_train_batch_size 1 --train_batch_size 128""",
        """--fsdp --fsdp_cpu_offload --use_mp_opt --engine_tp_size 2 --engine_mem_util 0.85 --enable_engine_sleep
        --micro_train_batch_size 1 --train_batch_size 64""",
    ],
    ids=["high throughput", "memory efficient"],
)
def test_the_documents_command_lines_are_valid_on_eight_ranks(command: str) -> None:
    StrategyConfig.from_args(parse(*command.split())).checked(8)


def test_the_vision_language_command_line_is_valid_on_eight_ranks() -> None:
    words = "--fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples --enable_engine_sleep --plot_every 20"
    StrategyConfig.from_args(parse(*words.split())).checked(8)
