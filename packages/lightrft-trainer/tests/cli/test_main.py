from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightrft.cli.main import EXIT_WRONG_USE, build_parser, main


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_help_and_wrong_settings_load_no_torch() -> None:
    code = """
import sys, json, contextlib, io
from lightrft.cli.main import main
codes = []
for argv in ([], ["train", "--list_presets"], ["train", "--bf16", "--fp16"], ["doctor", "--preset", "none"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codes.append(main(argv))
heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
print(json.dumps([codes, heavy]))
"""
    assert json.loads(run(code)) == [[0, 0, 2, 2], []]


def test_wrong_settings_are_a_list_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--bf16", "--fp16", "--temperature", "-1"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("lightrft: ")
    assert "  - --bf16 with --fp16: choose one" in shown
    assert "  - --temperature -1.0: must be above 0" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", ["train", "train-vl", "doctor"])
def test_presets_are_listed_with_what_they_do(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--list_presets"]) == 0
    listed = capsys.readouterr().out
    assert "default: What `lightrft train` does without a model" in listed
    assert "gsm8k: GRPO for a chat model on GPUs with GSM8K" in listed


@pytest.mark.parametrize(
    "flags",
    [
        "--zero_stage 2 --engine_tp_size 4 --engine_mem_util 0.9 --enable_engine_sleep --train_batch_size 128",
        "--fsdp --fsdp_cpu_offload --use_mp_opt --engine_tp_size 2 --engine_mem_util 0.85 --train_batch_size 64",
        "--fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples --enable_engine_sleep --plot_every 20",
        "--engine_type vllm --disable_engine_sleep --adam_offload --sp_size 2 --fused_linear_logprob --chunk_size 4096",
        "--log_dir ./logs --plot_every 10 --bf16",
    ],
)
def test_the_documents_command_lines_parse(flags: str) -> None:
    for command in ("train", "train-vl"):
        assert build_parser().parse_args([command, *flags.split()]).command == command


def test_all_faults_of_a_command_line_are_named_at_once_without_a_screen_of_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = "--temprature 0.5 --eps_clip x --kl_estimator k9 --top_p 2 --qqqq --generate_max_len 0"
    assert main(["train", *typed.split()]) == EXIT_WRONG_USE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "lightrft: 6 settings are wrong:"
    said = sorted(line.removeprefix("  - ") for line in lines[1:])
    flags = "--eps_clip 'x'", "--generate_max_len 0", "--kl_estimator 'k9'", "--qqqq", "--temprature", "--top_p 2.0"
    assert [text.split(": ")[0] for text in said] == list(flags)
    assert any("did you mean --temperature?" in text for text in said)


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_flag_that_there_is_not_is_named_with_the_nearest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--engin_type", "hf"]) == EXIT_WRONG_USE
    assert "--engin_type: unknown flag; did you mean --engine_type" in capsys.readouterr().err


def test_a_switch_with_a_value_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--fsdp", "False"]) == EXIT_WRONG_USE
    assert "'False': unexpected argument; a switch takes no value" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output_dir", "/proc/nowhere"]) == EXIT_WRONG_USE
    assert "--output_dir '/proc/nowhere': " in capsys.readouterr().err


def test_what_argparse_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (["trian"], ["train", "--top_p"], ["convert"]):
        with pytest.raises(SystemExit) as left:
            main(typed)
        assert left.value.code == EXIT_WRONG_USE
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["train.py", "train_vl.py"])
def test_the_example_scripts_take_the_same_flags(name: str) -> None:
    script = Path(__file__).parents[2] / "examples" / name
    result = subprocess.run(
        [sys.executable, str(script), "--bf16", "--fp16"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert "--bf16 with --fp16: choose one" in result.stderr
