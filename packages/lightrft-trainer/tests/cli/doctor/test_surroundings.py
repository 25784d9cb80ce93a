from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lightrft.cli.doctor import surroundings
from lightrft.strategy.config import StrategyConfig


class Installed:
    """A distribution that brought some files."""

    version = "0.1.0"

    def __init__(self, name: str, *files: str) -> None:
        self.metadata = {"Name": name}
        self.files = [Path(file) for file in files]


def config(**settings: Any) -> StrategyConfig:
    fitting = {"fsdp": True, "engine_type": "hf", "train_batch_size": 2, "rollout_batch_size": 2, "init_kl_coef": 0.0}
    return StrategyConfig(**{**fitting, "n_samples_per_prompt": 2, **settings})


MACHINE: dict[str, Any] = {
    "cpus": 8,
    "memory_gib": 32.0,
    "memory_free_gib": 16.0,
    "accelerators": [],
    "shared_memory_free_gib": 8.0,
    "name_lookup_seconds": 0.001,
}


# ---- the namespace ---------------------------------------------------------------------------------------------------
def test_a_distribution_that_owns_the_namespace_is_named_with_the_way_out() -> None:
    found: Any = [
        Installed("lightrft", "lightrft/__init__.py"),
        Installed("lightrft-core", "lightrft/utils/__init__.py"),
    ]
    owners = surroundings.owners_of(surroundings.NAMESPACE_FILE, found)
    assert owners == ["lightrft 0.1.0"]
    finding = surroundings.judge_namespace(owners, None)
    assert finding.status == "failed"
    assert "lightrft 0.1.0 brought lightrft/__init__.py" in finding.text
    assert finding.cure.startswith("pip uninstall lightrft,")


def test_a_stray_file_is_named() -> None:
    finding = surroundings.judge_namespace([], "/somewhere/lightrft/__init__.py")
    assert finding.status == "failed"
    assert finding.cure.startswith("delete /somewhere/lightrft/__init__.py")


def test_here_the_namespace_is_free() -> None:
    assert surroundings.namespace().status == "ok"


# ---- packages --------------------------------------------------------------------------------------------------------
def test_versions_are_those_installed() -> None:
    finding = surroundings.packages(config())
    assert finding.status == "ok"
    assert {"Python", "lightrft-core", "lightrft-trainer", "torch", "transformers"} <= set(finding.figures)


def test_an_engine_that_is_missing_is_named_with_its_install_line() -> None:
    finding = surroundings.packages(config(engine_type="nowhere"))
    assert (finding.status, finding.layer) == ("failed", "the installation")
    assert "--engine_type nowhere: no such engine is installed" in finding.text


# ---- the machine -----------------------------------------------------------------------------------------------------
def test_the_machine_is_read() -> None:
    finding = surroundings.machine(config(), 1)
    assert finding.figures["cpus"] >= 1
    assert finding.figures["memory_gib"] >= finding.figures["memory_free_gib"] > 0


def test_two_ranks_do_not_share_an_accelerator() -> None:
    two = {**MACHINE, "accelerators": ["H", "H"]}
    assert surroundings.judge_machine(two, config(), 2).status == "ok"
    finding = surroundings.judge_machine(two, config(), 3)
    assert (finding.status, finding.cure) == ("failed", "--nproc_per_node 2")


def test_a_container_with_little_shared_memory_is_warned_of() -> None:
    small = {**MACHINE, "shared_memory_free_gib": 0.06}
    assert surroundings.judge_machine(small, config(), 1).status == "ok"
    finding = surroundings.judge_machine(small, config(), 2)
    assert finding.status == "warning"
    assert "--shm-size" in finding.cure


def test_a_name_server_that_answers_late_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getnameinfo", lambda *_: time.sleep(0.01))
    assert surroundings.machine(config(), 2).figures["name_lookup_seconds"] >= 0.01
    slow = {**MACHINE, "name_lookup_seconds": 5.0, "shared_memory_free_gib": 0.06}
    finding = surroundings.judge_machine(slow, config(), 2)
    assert finding.status == "warning"
    assert "/etc/hosts" in finding.cure
    assert "--shm-size" in finding.cure


# ---- the settings ----------------------------------------------------------------------------------------------------
def test_settings_are_held_against_the_ranks_as_train_would() -> None:
    assert surroundings.settings(config(), 2, "cpu").status == "ok"
    finding = surroundings.settings(config(sp_size=2, temperature=0.0), 3, "cpu")
    assert finding.status == "failed"
    assert "--sp_size 2" in finding.text
    assert "--temperature" in finding.text


def test_what_the_engine_cannot_do_is_refused_before_a_rank_starts() -> None:
    finding = surroundings.settings(config(engine_tp_size=2), 2, "cpu")
    assert "engine 'hf' runs on one rank only" in finding.text


def test_a_presets_form_of_data_needs_none_here() -> None:
    form = {"input_key": "question", "apply_chat_template": True, "system_prompt": "Be brief."}
    assert surroundings.settings(config(**form), 1, "cpu").status == "ok"


def test_a_model_without_data_is_examined_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert surroundings.settings(config(pretrain=str(tmp_path)), 1, "cpu").status == "ok"
    finding = surroundings.settings(config(pretrain=str(tmp_path / "none")), 1, "cpu")
    assert "no such folder" in finding.text


def test_a_run_that_exists_already_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert surroundings.settings(config(output_dir=str(tmp_path)), 1, "cpu").status == "ok"


@pytest.mark.parametrize("backend", ["fsdp", "fake"])
def test_the_finding_names_what_was_chosen(backend: str) -> None:
    finding = surroundings.settings(config(fsdp=False, strategy=backend, bf16=True), 1, "cpu")
    assert finding.text.startswith(f"{backend} × hf in bfloat16 on 1 ranks")
