from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from lightrft.cli import main as cli
from lightrft.cli import settings
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
    with pytest.raises(ConfigError, match="there are default"):
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
        (("--train_batch_size", "96", "--micro_train_batch_size", "8"), "must divide a step's samples"),
        (("--prompt_data", "org/data", "--reward", "exact_match"), "--pretrain: needed with --prompt_data"),
        (("--pretrain", "org/model"), "--prompt_data: needed with --pretrain"),
        (("--use_gspo",), "add --loss_agg_mode seq-mean-token-mean"),
        (("--kl_target", "0.1"), "give it a start above 0"),
        (("--use_kl_loss",), "give it a value above 0"),
        (("--critic_pretrain", "org/model"), "only --advantage_estimator gae has a critic"),
        (("--importance_sampling_cap", "2", "--top_p", "0.9"), "compares full distributions"),
        (("--max_logprob_drift", "0.1", "--top_k", "5"), "compares full distributions"),
        (("--overlong_buffer",), "at most --generate_max_len"),
        (("--eval_data", "org/data"), "works only with --prompt_data"),
        (("--pretrain", "./nowhere"), "no such folder"),
        (("--reward", "exact"), "Did you mean exact_match?"),
        (("--reward", "exact_match=much"), "is no weight"),
        (("--reward", "nowhere:reward"), "no module 'nowhere'"),
    ],
)
def test_a_run_that_cannot_work_is_refused_with_what_would(arguments: tuple[str, ...], said: str) -> None:
    extra = () if "--preset" in arguments else ("--preset", "default")
    assert said in "\n".join(faults(*arguments, *extra))


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
    from lightrft.strategy import registry

    of_core = {kind: tuple(p for p in registry._entry_points(kind) if p.name == "fake") for kind in registry.FLAGS}
    monkeypatch.setattr(registry, "_entry_points", of_core.__getitem__)
    found = "\n".join(faults(*flags, "--output_dir", str(tmp_path / "run")))
    assert "(installed: fake)" in found
    for extra in ("fsdp", "deepspeed", "hf"):
        assert f"[{extra}]" in found


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "add --resume to go on with it" in "\n".join(faults("--output_dir", str(tmp_path)))


def test_a_saved_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = load("--adam_betas", "0.8", "0.9", "--disable_engine_sleep")
    config.to_yaml(tmp_path / "c.yaml")
    assert StrategyConfig.from_yaml(tmp_path / "c.yaml") == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["adam_betas"] == [0.8, 0.9]


def test_the_default_preset_has_the_settings_measured_for_its_task() -> None:
    from lightrft.data.tasks import TASK_SETTINGS

    preset = settings.read_preset("default")
    preset["adam_betas"] = tuple(preset["adam_betas"])
    assert {name: preset[name] for name in TASK_SETTINGS} == TASK_SETTINGS


def test_an_engine_for_the_reward_model_needs_a_model_and_an_engine_that_serves_one() -> None:
    model = ("--reward_pretrain", "org/rm")
    assert any("--reward_pretrain, which is not given" in fault for fault in faults("--rm_use_engine"))
    assert any("works only with --rm_use_engine" in fault for fault in faults("--rm_engine_cudagraph"))
    assert any("leave --rm_use_engine away" in fault for fault in faults("--rm_use_engine", *model))


@pytest.mark.parametrize("flag", ["--output_dir", "--log_dir"])
def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "file"
    path.touch()
    assert f"{flag} {str(path)!r}: is a file; name a folder" in faults(flag, str(path))
