from __future__ import annotations

import argparse
import errno
import importlib.machinery
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightrft.cli import main as cli
from lightrft.cli import settings
from lightrft.cli.run_checks import ONLY_WITH, run_faults
from lightrft.data.blending import parse_shares
from lightrft.data.records import DataError
from lightrft.data.rendering import PromptFormat
from lightrft.strategy import registry
from lightrft.strategy.config import FIELDS, StrategyConfig
from lightrft.strategy.errors import ConfigError


def parse(*arguments: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["train", *arguments])


def load(*arguments: str) -> StrategyConfig:
    return settings.load_settings(parse(*arguments))


def faults(*arguments: str, multimodal: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings.check_settings(load(*arguments), multimodal=multimodal)
    return caught.value.problems


def test_no_arguments_choose_fsdp_and_the_embedded_engine() -> None:
    config = load()
    assert (config.backend, config.engine_type) == ("fsdp", "hf")


def test_the_default_preset_is_right_on_one_and_two_ranks() -> None:
    for ranks in (1, 2):
        settings.check_settings(load(), multimodal=False, world_size=ranks)


def test_naming_a_model_leaves_the_documents_defaults() -> None:
    config = load("--pretrain", "org/model", "--prompt_data", "org/data", "--reward", "exact_match")
    assert (config.backend, config.engine_type, config.rollout_batch_size) == ("deepspeed", "vllm", 512)


def test_a_zero_stage_means_deepspeed_though_the_preset_says_fsdp() -> None:
    assert load("--zero_stage", "2").backend == "deepspeed"
    assert load("--zero_stage", "2", "--fsdp").backend == "fsdp"
    assert load("--strategy", "mine").backend == "mine"


def test_what_is_typed_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 7\nseed: 5\n")
    config = load("--config", str(path), "--seed", "6")
    assert (config.max_steps, config.seed, config.engine_type) == (7, 6, "hf")


def test_a_flag_typed_at_its_default_value_still_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\n")
    assert load("--config", str(path), "--seed", "42").seed == 42


def test_resume_takes_the_saved_settings_and_what_is_typed_now(tmp_path: Path) -> None:
    StrategyConfig(fsdp=True, engine_type="hf", seed=9, max_steps=5).to_yaml(tmp_path / "config.yaml")
    config = load("--resume", "--output_dir", str(tmp_path), "--max_steps", "8")
    assert (config.resume, config.seed, config.max_steps, config.output_dir) == (True, 9, 8, str(tmp_path))


def test_a_run_that_was_killed_before_it_saved_anything_starts_again_as_it_is_called(tmp_path: Path) -> None:
    config = load("--resume", "--output_dir", str(tmp_path), "--max_steps", "8")
    assert (config.resume, config.max_steps, config.backend) == (True, 8, "fsdp")


def test_nothing_to_resume_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; name a run's folder"):
        load("--resume", "--output_dir", str(tmp_path / "nowhere"))


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="there are default, gsm8k"):
        load("--preset", "fast")


def test_every_preset_is_readable_and_has_a_title() -> None:
    for name in settings.preset_names():
        assert settings.read_preset(name).keys() <= FIELDS.keys()
        assert len(settings.preset_title(name)) > 20


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    found = faults(
        "--bf16",
        "--fp16",
        "--temperature",
        "-1",
        "--prompt_data",
        str(tmp_path / "none.jsonl"),
        "--fsdp",
        "--engine_type",
        "hf",
    )
    text = "\n".join(found)
    for part in ("--bf16 with --fp16", "--temperature -1", "no such file"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--train_batch_size", "96", "--micro_train_batch_size", "8"), "must divide the number of samples per step"),
        (("--prompt_data", "org/data", "--reward", "exact_match"), "--pretrain: needed with --prompt_data"),
        (("--pretrain", "org/model"), "--prompt_data: needed with --pretrain"),
        (("--use_gspo",), "add --loss_agg_mode seq-mean-token-mean"),
        (("--kl_target", "0.1"), "start it above 0"),
        (("--use_kl_loss",), "set it above 0"),
        (("--critic_pretrain", "org/model"), "works only with --advantage_estimator gae"),
        (("--prompt_data_probs", "x"), "--prompt_data_probs 'x': must be positive numbers separated by commas"),
        (("--prompt_data_probs", "-1"), "--prompt_data_probs '-1': must be positive numbers"),
        (("--input_template", "Q:"), "--input_template 'Q:': must be a text with {} where the input belongs"),
        (("--system_prompt", "Be brief."), "--system_prompt 'Be brief.': works only with --apply_chat_template"),
        (("--flash_attn",), "--flash_attn: needs 16 bits and this run computes in fp32; add --bf16"),
        (("--seed", "4294967296"), "--seed 4294967296: must be between 0 and 4294967295"),
        (("--engine_tp_size", "2", "--engine_type", "hf"), "use --engine_type vllm or sglang"),
        (("--importance_sampling_cap", "2", "--top_p", "0.9"), "compares full distributions"),
        (("--max_logprob_drift", "0.1", "--top_k", "5"), "compares full distributions"),
        (("--overlong_buffer",), "below --generate_max_len"),
        (("--overlong_buffer", "--generate_max_len", "1024"), "penalized from its first token"),
        (("--eval_data", "org/data"), "works only with --prompt_data"),
        (("--label_key", "answer"), "--label_key 'answer': works only with --pretrain and --prompt_data"),
        (("--preset", "gsm8k"), "--apply_chat_template: works only with --pretrain and --prompt_data"),
        (("--pretrain", "./nowhere"), "no such folder"),
        (("--reward", "exact"), "Did you mean exact_match?"),
        (("--reward", "exact_match=much"), "is not a weight"),
        (("--reward", "nowhere:reward"), "no module 'nowhere'"),
    ],
)
def test_a_run_that_cannot_work_is_refused_with_what_would(arguments: tuple[str, ...], said: str) -> None:
    extra = () if "--preset" in arguments else ("--preset", "default")
    assert said in "\n".join(faults(*arguments, *extra))


NUMBERS = st.floats(-1e99, 1e99).map(str) | st.sampled_from(["", " ", "x", "1", "0.5", "1_0", "inf", "nan"])


@given(st.lists(NUMBERS, max_size=3).map(",".join) | st.text(max_size=6))
def test_shares_are_right_where_the_data_takes_them(text: str) -> None:
    count = len(text.split(","))
    config = StrategyConfig(prompt_data=",".join(["org/data"] * count), prompt_data_probs=text)
    try:
        parse_shares(text, count)
    except DataError:
        with pytest.raises(ConfigError, match="--prompt_data_probs"):
            config.checked()
    else:
        config.checked()


@given(template=st.none() | st.text("{}a", max_size=4), system=st.none() | st.just("Be brief."), chat=st.booleans())
def test_a_prompts_form_is_right_where_the_data_takes_it(template: str | None, system: str | None, chat: bool) -> None:
    form: dict[str, Any] = {"input_template": template, "system_prompt": system, "apply_chat_template": chat}
    config = StrategyConfig(**form, pretrain="org/model", prompt_data="org/data", reward="exact_match")
    try:
        PromptFormat(**form)
    except DataError:
        with pytest.raises(ConfigError, match=r"--input_template|--system_prompt"):
            settings.check_settings(config, multimodal=False)
    else:
        config.checked()
        assert run_faults(config) == []


@pytest.mark.parametrize("name", ["foo", "reduce_lr_on_plateau", "warmup_stable_decay"])
def test_a_schedule_that_cannot_be_made_is_refused_with_those_that_can(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--lr_scheduler '{name}': input should be 'constant', .*'polynomial'"):
        load("--lr_scheduler", name)


def test_every_wrong_text_is_named_at_once() -> None:
    typed = "--lr_scheduler greedy --prompt_data_probs x --input_template Q: --seed -1 --top_k -2"
    with pytest.raises(ConfigError) as caught:
        load(*typed.split())
    assert {fault.split()[0] for fault in caught.value.problems} == set(typed.split()[::2])


DATA = "--prompt_data org/data --pretrain org/model --reward exact_match"
PARENTS = {
    "--lambd 0.9": "--advantage_estimator gae",
    "--value_clip 0.5": "--advantage_estimator gae",
    "--critic_learning_rate 1e-4": "--advantage_estimator gae",
    "--critic_pretrain org/model": "--advantage_estimator gae",
    "--kl_horizon 50": "--kl_target 0.1 --init_kl_coef 0.1",
    "--ema_beta 0.5": "--enable_ema",
    "--overlong_buffer_len 2": "--overlong_buffer",
    "--overlong_buffer_penalty_factor 0.5": "--overlong_buffer --overlong_buffer_len 2",
    "--dynamic_sampling_max_rounds 2": "--dynamic_sampling",
    "--num_trajectories_to_save 2": "--save_trajectories",
    "--initial_model_shard_size 1": "--init_kl_coef 0.1",
    "--system_prompt Hello": f"--apply_chat_template {DATA}",
    "--input_key question": DATA,
    "--label_key answer": DATA,
    "--input_template Q:{}": DATA,
    "--apply_chat_template": DATA,
    "--rm_engine_cudagraph": "--rm_use_engine --reward_pretrain org/rm",
}


def test_every_setting_of_the_table_is_tried() -> None:
    assert {flags.split()[0][2:] for flags in PARENTS} == {name for row in ONLY_WITH for name in row[0].split()}


@pytest.mark.parametrize("flags", PARENTS)
def test_what_has_no_effect_is_refused_and_beside_its_parent_taken(flags: str) -> None:
    [fault] = faults(*flags.split())
    assert fault.startswith(f"{flags.split()[0]}")
    assert re.search(rf"works only with .*{PARENTS[flags].split()[0]}", fault)
    assert run_faults(load(*flags.split(), *PARENTS[flags].split())) == []


@pytest.mark.parametrize("name", [name for row in ONLY_WITH for name in row[0].split()])
def test_a_default_that_is_typed_is_never_refused(name: str) -> None:
    default = FIELDS[name].default
    typed = [] if default is None else [f"--no_{name}"] if default is False else [f"--{name}", str(default)]
    settings.check_settings(load(*typed), multimodal=False)


def test_beside_adapters_there_is_no_reference_model_to_shard() -> None:
    flags = "--initial_model_shard_size 1 --init_kl_coef 0.1 --lora_rank 2"
    assert "no --lora_rank" in "\n".join(faults(*flags.split()))


@pytest.mark.parametrize(
    ("flags", "package", "cure"),
    [
        ("--flash_attn --bf16", "flash_attn", "pip install flash-attn"),
        ("--use_wandb", "wandb", '"lightrft-trainer[wandb]"'),
        ("--use_trackio", "trackio", '"lightrft-trainer[trackio]"'),
        ("--use_tensorboard", "tensorboard", '"lightrft-trainer[tensorboard]"'),
    ],
)
def test_a_package_that_is_not_there_is_named_with_what_installs_it(
    flags: str, package: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    [fault] = faults(*flags.split())
    assert fault.startswith(f"{flags.split()[0]}: {package} is not installed; ")
    assert cure in fault
    monkeypatch.setattr(settings, "find_spec", lambda name: importlib.util.find_spec("yaml"))
    settings.check_settings(load(*flags.split()), multimodal=False)


def test_the_folder_that_a_tracker_leaves_is_not_taken_for_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    found = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    assert found is not None
    monkeypatch.setattr(settings, "find_spec", lambda name: found)
    assert "wandb is not installed" in "\n".join(faults("--use_wandb"))


def test_each_of_several_reward_models_is_looked_for(tmp_path: Path) -> None:
    settings.check_settings(load("--reward_pretrain", f"{tmp_path}, org/model,{tmp_path}"), multimodal=False)
    found = faults("--reward_pretrain", f"{tmp_path},{tmp_path / 'a'},org/model,,./b")
    assert [fault.split(":")[0] for fault in found] == [
        f"--reward_pretrain {str(tmp_path / 'a')!r}",
        "--reward_pretrain ''",
        "--reward_pretrain './b'",
    ]


def test_an_engine_that_is_split_is_not_the_presets(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("engine_tp_size: 2\n")
    assert load("--engine_tp_size", "4").engine_type == "vllm"
    assert load("--config", str(path)).engine_type == "vllm"
    assert load("--engine_tp_size", "1").engine_type == "hf"
    assert load("--engine_tp_size", "2", "--engine_type", "sglang").engine_type == "sglang"


@pytest.mark.parametrize("place", ["typed", "file", "saved"])
def test_the_embedded_engine_is_not_split_where_it_is_asked_for(place: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("engine_type: hf\nfsdp: true\n")
    given = {
        "typed": ("--engine_type", "hf"),
        "file": ("--config", str(path)),
        "saved": ("--resume", "--output_dir", str(tmp_path)),
    }
    found = faults("--engine_tp_size", "2", *given[place])
    assert found[0].startswith("--engine_tp_size 2: engine 'hf' runs on one rank only")
    assert "vllm or sglang" in found[0]


MODEL = "--pretrain org/model --prompt_data org/data --reward exact_match"
# The documents' command lines, then their lists of flags beside a model and data; all on eight GPUs.
COMMANDS = {
    "high throughput": """train --zero_stage 2 --engine_tp_size 4 --engine_mem_util 0.9 --enable_engine_sleep
        --micro_train_batch_size 1 --train_batch_size 128""",
    "memory efficient": """train --fsdp --fsdp_cpu_offload --use_mp_opt --engine_tp_size 2 --engine_mem_util 0.85
        --enable_engine_sleep --micro_train_batch_size 1 --train_batch_size 64""",
    "vision": f"""train-vl --fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples --enable_engine_sleep
        --plot_every 20 {MODEL}""",
    "engine": f"train --engine_tp_size 4 --engine_mem_util 0.85 --engine_type vllm --enable_engine_sleep {MODEL}",
    "awake": f"train --engine_tp_size 4 --engine_mem_util 0.85 --engine_type vllm --disable_engine_sleep {MODEL}",
    "distributed": f"train --fsdp --zero_stage 2 --fsdp_cpu_offload --adam_offload --sp_size 2 {MODEL}",
    "optimization": f"train --fsdp --packing_samples --use_mp_opt --fused_linear_logprob --chunk_size 4096 {MODEL}",
    "monitoring": f"train --log_dir ./logs --plot_every 10 {MODEL}",
    "offload": f"train --fsdp --fsdp_cpu_offload {MODEL}",
    "long": f"train --sp_size 4 {MODEL}",
    "precision": f"train --fsdp --bf16 --use_mp_opt {MODEL}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_documents_command_lines_pass_on_eight_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available", lambda kind: ["deepspeed", "fsdp", "vllm"])
    command = cli.build_parser().parse_args(COMMANDS[name].split())
    config = settings.load_settings(command)
    assert settings.check_settings(config, multimodal=command.command == "train-vl", world_size=8) == config
    assert config.engine_type == "vllm"


def test_the_documents_vision_command_line_lacks_only_a_model_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available", lambda kind: ["fsdp", "vllm"])
    [fault] = faults(*COMMANDS["vision"].removesuffix(MODEL).split()[1:], multimodal=True)
    assert "train-vl has no built-in task" in fault


def test_rollouts_must_divide_over_the_data_ranks() -> None:
    with pytest.raises(ConfigError, match="--rollout_batch_size 64: must be a multiple of the 3 data ranks"):
        settings.check_settings(load(), multimodal=False, world_size=3)


def test_train_vl_asks_for_a_model_and_data() -> None:
    assert "train-vl has no built-in task" in "\n".join(faults(multimodal=True))


def test_a_missing_backend_or_engine_says_what_to_install() -> None:
    found = "\n".join(faults("--strategy", "nowhere", "--engine_type", "sglang", "--preset", "default"))
    assert "--strategy nowhere: no such strategy is installed" in found
    assert "lightrft-engines[sglang]" in found


@pytest.mark.parametrize("flags", [(), ("--fsdp",), ("--zero_stage", "3")])
def test_without_any_backend_both_are_named_with_what_installs_them(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An environment of lightrft-trainer alone: it knows the fake strategy and the embedded engine's name."""
    of_core = {kind: tuple(p for p in registry._entry_points(kind) if p.name == "fake") for kind in registry.FLAGS}
    monkeypatch.setattr(registry, "_entry_points", of_core.__getitem__)
    found = "\n".join(faults(*flags, "--output_dir", str(tmp_path / "run")))
    assert "(installed: fake)" in found
    for extra in ("fsdp", "deepspeed", "hf"):
        assert f"[{extra}]" in found


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "add --resume to continue it" in "\n".join(faults("--output_dir", str(tmp_path)))


def test_a_saved_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = load("--adam_betas", "0.8", "0.9", "--disable_engine_sleep")
    config.to_yaml(tmp_path / "c.yaml")
    assert StrategyConfig.from_yaml(tmp_path / "c.yaml") == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["adam_betas"] == [0.8, 0.9]


def test_an_engine_for_the_reward_model_needs_a_model_and_an_engine_that_serves_one() -> None:
    model = ("--reward_pretrain", "org/rm")
    assert any("--reward_pretrain, which is not given" in fault for fault in faults("--rm_use_engine"))
    assert any("works only with --rm_use_engine" in fault for fault in faults("--rm_engine_cudagraph"))
    assert any("drop --rm_use_engine" in fault for fault in faults("--rm_use_engine", *model))


@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "file"
    path.touch()
    for wanted in (path, path / "run"):
        assert f"{flag} {str(path)!r}: is a file; name a folder" in faults(flag, str(wanted))


@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
def test_a_folder_that_may_not_be_written_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(settings.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    run = tmp_path / "a" / "run"
    assert f"{flag} {str(run)!r}: nothing may be written into {tmp_path}; name another folder" in faults(flag, str(run))


@pytest.mark.parametrize(
    ("name", "said"), [("x" * 300, os.strerror(errno.ENAMETOOLONG).lower()), ("l\udce9", "is no text in")]
)
@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
def test_a_folder_that_no_disk_or_library_takes_is_refused(tmp_path: Path, flag: str, name: str, said: str) -> None:
    (found,) = faults(flag, str(tmp_path / name))
    assert found.startswith(flag) and said in found and "name another folder" in found


@pytest.mark.parametrize("flag", ["--output_dir", "--pretrain", "--prompt_data"])
def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    path, stat = tmp_path / "closed" / "it.jsonl", os.stat

    def refuse(asked: Any, **options: Any) -> os.stat_result:  # root may enter anywhere
        if str(asked).startswith(str(path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(asked))
        return stat(asked, **options)

    path.parent.mkdir()
    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda place, mode: place != path.parent)
    assert any(
        str(path) in fault and re.search("permission denied|nothing may be", fault) for fault in faults(flag, str(path))
    )


def test_the_home_folder_may_be_written_as_a_tilde_wherever_a_setting_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "rm", "run"):
        (tmp_path / name).mkdir()
    path = tmp_path / "run.yaml"
    path.write_text("pretrain: ~/model\nreward_pretrain: org/rm, ~/rm\nprompt_data: org/data\n")
    flags = ("--config", str(path), "--output_dir=~/run", "--log_dir=~/logs", "--fsdp", "--engine_type", "hf")
    for more in ((), ("--resume",)):
        config = load(*flags, *more)
        assert (config.pretrain, config.reward_pretrain) == (f"{tmp_path}/model", f"org/rm,{tmp_path}/rm")
        assert (config.output_dir, config.log_dir) == (f"{tmp_path}/run", f"{tmp_path}/logs")
    assert load("--output_dir", "first, second").output_dir == "first, second", "a folder's own comma is no list"


@pytest.mark.parametrize("flags", [(), ("--lora_rank", "8", "--actor_learning_rate", "1e-5")])
def test_the_gsm8k_preset_asks_for_a_model_and_data_alone(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "model").mkdir()
    data = tmp_path / "train.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\\n#### 2"}\n')
    preset = ("--preset", "gsm8k")
    named = ("--pretrain", str(tmp_path / "model"), "--prompt_data", str(data), "--eval_data", str(data))
    for ranks in (1, 2, 4, 8, 16):
        config = settings.check_settings(load(*preset, *named, *flags), multimodal=False, world_size=ranks)
    assert (config.dtype_name, config.input_key, config.label_key) == ("bfloat16", "question", "answer")
    assert "needed with --pretrain" in "\n".join(faults(*preset, *named[:2], *flags))


def test_the_gsm8k_presets_reward_reads_the_form_that_its_system_prompt_asks_for() -> None:
    from lightrft.rewards import build_reward

    preset = settings.read_preset("gsm8k")
    answer = next(word for word in preset["system_prompt"].split() if "{}" in word).rstrip(".")
    responses = [f"So it is {answer.replace('{}', f'{{{value}}}')}." for value in ("2", "3")] + ["2", "no idea"]
    labels = ["1 + 1 = <<1+1=2>>2\n#### 2"] * 4
    rewards = build_reward(preset["reward"])(["1 + 1?"] * 4, responses, labels)
    assert [round(float(reward), 6) for reward in rewards.rewards] == [1.1, 0.1, 1.0, 0.0]
