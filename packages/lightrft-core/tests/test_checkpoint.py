"""What no strategy changes about checkpoints; what a strategy keeps is in the suite."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lightrft.strategy import checkpoint_folders
from lightrft.strategy.checkpoint_folders import MANIFEST, whole_checkpoints
from lightrft.strategy.conversion import convert
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.sealed_file import SealedFile
from lightrft.testing.faults import calling_first, cut, flip_bit


def saved(folder: Path, steps: int = 1, **options: Any) -> tuple[FakeStrategy, nn.Module]:
    strategy = FakeStrategy()
    model = nn.Linear(64, 64)
    optimizer = strategy.create_optimizer(model)
    for step in range(1, steps + 1):
        strategy.backward(model(torch.ones(1, 64)).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model)
        strategy.save_ckpt(model, folder, client_state={"step": step}, **options)
    return strategy, model


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_is_read_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, model = saved(tmp_path)
    expected = model.weight.detach().clone()
    nn.init.zeros_(model.weight)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    strategy.load_ckpt(model, tmp_path)
    assert torch.equal(model.weight, expected)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors", ""}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_rank_wrote_is_not_read_again_for_its_digest(tmp_path: Path, asynchronous: bool) -> None:
    with mock.patch.object(checkpoint_folders, "seal_of", wraps=checkpoint_folders.seal_of) as seal_of:
        strategy, model = saved(tmp_path, asynchronous=asynchronous)
        strategy.finish_checkpoint()
    read = {call.args[0].name for call in seal_of.call_args_list}
    assert "0.safetensors" in read
    assert not any(name.startswith("state-") for name in read), read
    assert strategy.load_ckpt(model, tmp_path, tag="step_1").client_state == {"step": 1}, "every digest is there"


def test_asynchronous_saves_write_from_the_same_memory(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path, steps=2, asynchronous=True)
    kept = {name: copy.data_ptr() for name, copy in strategy.record(model).copies._kept.items()}
    strategy.save_ckpt(model, tmp_path, client_state={"step": 3}, asynchronous=True)
    assert {name: copy.data_ptr() for name, copy in strategy.record(model).copies._kept.items()} == kept
    assert len(kept) == 6, "weight and two moments, of weight and bias"


def test_max_mem_counts_in_gigabytes_of_ten_to_the_nine(tmp_path: Path) -> None:
    saved(tmp_path / "probe")
    one = size(tmp_path / "probe")
    saved(tmp_path / "runs", steps=4, max_mem=2.5 * one / 1e9)
    assert whole_checkpoints(tmp_path / "runs") == ["step_4", "step_3"]


def test_pruning_comes_after_success(tmp_path: Path) -> None:
    """With max_num=1, a save that fails must leave the checkpoint that there was."""
    strategy, model = saved(tmp_path)

    def full() -> None:
        raise OSError("no space left on device")

    with calling_first(Path, "rename", full), pytest.raises(CheckpointError, match="no space"):
        strategy.save_ckpt(model, tmp_path, client_state={"step": 2}, max_num=1)
    assert whole_checkpoints(tmp_path) == ["step_1"]
    assert strategy.load_ckpt(model, tmp_path).client_state == {"step": 1}


def test_a_clock_that_is_set_back_makes_no_old_checkpoint_the_newest(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path)
    tomorrow = (tmp_path / "step_1").stat().st_mtime + 86400
    os.utime(tmp_path / "step_1", (tomorrow, tomorrow))
    for step in (2, 3):
        strategy.save_ckpt(model, tmp_path, client_state={"step": step}, max_num=2)
    assert whole_checkpoints(tmp_path) == ["step_3", "step_2"]


def test_a_disk_too_full_for_a_folder_is_explained(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with calling_first(Path, "mkdir", full), pytest.raises(CheckpointError, match="It takes about"):
        strategy.save_ckpt(model, tmp_path / "new" / "runs")


def test_a_disk_too_full_for_the_tokenizer_is_explained(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")  # just so say those that are written in Rust

    with pytest.raises(CheckpointError, match="It takes about"):
        FakeStrategy().save_model(nn.Linear(2, 2), Tokenizer(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_files_of_weights_may_be_read_by_whoever_may_read_the_others(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path / "runs")
    strategy.save_model(model, None, tmp_path / "model")
    (tmp_path / "plain").touch()
    modes = {path.name: path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model.safetensors", "0.safetensors", "state-00000-of-00001.safetensors"} <= modes.keys()
    assert set(modes.values()) == {modes["plain"]}, modes


def test_a_model_goes_into_a_folder_beside_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's may be the working directory, a mount, or hold a tokenizer that was saved before."""
    strategy, model = FakeStrategy(), nn.Linear(2, 2)
    target = tmp_path / "model"
    (target / "checkpoints").mkdir(parents=True)
    older = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in (*older, "tokenizer.json", "checkpoints/latest", "adapter_model.safetensors"):
        (target / name).write_text("mine")
    monkeypatch.chdir(target)
    for _ in range(2):
        strategy.save_model(model, None, ".")
        assert sorted(path.name for path in Path.cwd().iterdir()) == [
            "adapter_model.safetensors",
            "checkpoints",
            "model.safetensors",
            "tokenizer.json",
        ]
    assert (target / "checkpoints/latest").read_text() == "mine"
    with pytest.raises(CheckpointError, match="Not a directory"):
        strategy.save_model(model, None, "tokenizer.json")
    assert (target / "tokenizer.json").read_text() == "mine"


def test_a_model_that_cannot_be_put_in_its_place_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = FakeStrategy()
    strategy.save_model(nn.Linear(2, 2), None, tmp_path / "model")
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("stale")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    original = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.parent.name == ".partial" and self.suffix == ".safetensors":
            raise OSError("no more renames")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"no more renames\. What was there before is unchanged"):
        strategy.save_model(nn.Linear(2, 2), None, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e8m0fnu, torch.bool])
def test_rank_states_come_back_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"mine": torch.arange(6).view(2, 3).to(dtype), "number": torch.tensor(1).to(dtype)}
    strategy, model = saved(tmp_path, rank_state=state)
    (loaded,) = strategy.load_ckpt(model, tmp_path).rank_states
    for name, values in state.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == values.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("damage", "said"), [(cut, "bytes of"), (flip_bit, "was altered"), (Path.unlink, "is missing")]
)
def test_any_file_that_is_cut_altered_or_missing_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    strategy, model = saved(tmp_path / "whole")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "step_1").rglob("*.*")]
    assert {path.name for path in files} >= {"0.json", "0.safetensors", "client_state.json", "scalars.json", MANIFEST}
    for file in files:
        shutil.copytree(tmp_path / "whole", tmp_path / "broken", dirs_exist_ok=True)
        damage(tmp_path / "broken" / file)
        name = MANIFEST if file.name == MANIFEST else f"{file.relative_to('step_1')}.*{said}"
        if file.name == MANIFEST and damage is flip_bit:
            continue  # one letter of a parameter's name, say: another test's subject
        with pytest.raises(CheckpointError, match=name):
            strategy.load_ckpt(model, tmp_path / "broken", tag="step_1")


def test_latest_names_the_newest_and_may_be_missing(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path, steps=2)
    assert (tmp_path / "latest").read_text().strip() == "step_2"
    strategy.save_ckpt(model, tmp_path, client_state={"step": 3}, save_latest=False)
    assert strategy.load_ckpt(model, tmp_path).client_state == {"step": 2}
    (tmp_path / "latest").unlink()
    assert strategy.load_ckpt(model, tmp_path).client_state == {"step": 3}
    (tmp_path / "latest").write_text("step_99")
    assert strategy.load_ckpt(model, tmp_path).client_state == {"step": 3}


@pytest.mark.parametrize("tag", ["../out", "a/b", "..", ".hidden", "latest"])
def test_a_tag_is_the_name_of_a_folder_within(tmp_path: Path, tag: str) -> None:
    strategy, model = FakeStrategy(), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must be the name of a folder within"):
        strategy.save_ckpt(model, tmp_path / "checkpoints", tag=tag)
    assert not list(tmp_path.iterdir())


def test_a_number_is_a_tag(tmp_path: Path) -> None:
    strategy, model = FakeStrategy(), nn.Linear(2, 2)
    strategy.save_ckpt(model, tmp_path, tag=0)
    strategy.save_ckpt(model, tmp_path, tag=1)
    assert strategy.load_ckpt(model, tmp_path, tag=0).path == tmp_path / "0"


def test_what_is_no_checkpoint_is_not_replaced_by_one(tmp_path: Path) -> None:
    strategy, model = FakeStrategy(), nn.Linear(2, 2)
    (tmp_path / "mine").mkdir()
    strategy.save_ckpt(model, tmp_path, tag="mine")  # nothing is lost with an empty folder
    strategy.save_ckpt(model, tmp_path, tag="mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for tag in ("notes", "file"):
        with pytest.raises(CheckpointError, match="is there already, and no checkpoint; pass another tag"):
            strategy.save_ckpt(model, tmp_path, tag=tag)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_untitled_saves_are_numbered(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path / "other")
    for _ in range(2):
        strategy.save_ckpt(model, tmp_path)
    assert set(whole_checkpoints(tmp_path)) == {"save_0", "save_1"}


def test_what_another_program_or_a_killed_run_left_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text(json.dumps({"name": "a web page"}))
    assert whole_checkpoints(tmp_path) == []
    strategy, model = saved(tmp_path, steps=2, max_num=1)
    assert (tmp_path / "web" / MANIFEST).exists()
    shutil.copytree(tmp_path / "step_2", tmp_path / ".step_1.old")  # a run was killed while it removed it
    assert whole_checkpoints(tmp_path) == ["step_2"]
    (tmp_path / "latest").write_text("web")
    assert strategy.load_ckpt(model, tmp_path).path.name == "step_2"


def test_the_callers_tensors_may_not_take_our_names(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path)
    with pytest.raises(ValueError, match=r"rng\.torch"):
        strategy.save_ckpt(model, tmp_path, rank_state={"rng.torch": torch.zeros(1)})


def test_every_file_is_flushed_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: dict[str, int] = {}
    original = os.fsync

    def note(handle: int) -> None:
        flushed[os.readlink(f"/proc/self/fd/{handle}")] = os.fstat(handle).st_size
        original(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file a handle is: run on Linux")
    monkeypatch.setattr(os, "fsync", note)
    saved(tmp_path)
    convert(tmp_path / "step_1", tmp_path / "dcp", to="fsdp")
    for name in ("step_1", "dcp"):
        partial = tmp_path / f".{name}.partial"
        for path in (tmp_path / name).rglob("*"):  # whole: what is still in a buffer is not on the disk
            assert flushed[str(partial / path.relative_to(tmp_path / name))] == path.stat().st_size, path
        assert {str(partial), str(tmp_path)} <= flushed.keys()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_is_whole_when_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The run may be killed right then: a manifest that comes before what it lists would call half a save whole."""

    def sizes(folder: Path) -> dict[str, int]:
        return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}

    found: list[tuple[dict[str, int], set[str], str | None]] = []
    replace, write, late = checkpoint_folders.replace_folder, SealedFile.write, threading.Event()

    def named(staging: Path, final: Path) -> None:
        listed = json.loads((staging / MANIFEST).read_text())["files"]
        found.append((sizes(staging), {*listed, MANIFEST}, checkpoint_folders.damage(staging)))
        replace(staging, final)

    def written(file: SealedFile, data: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            late.wait(0.2)  # a background writer is slow to begin
            late.set()
        return write(file, data)

    saved(tmp_path / "other")
    monkeypatch.setattr(checkpoint_folders, "replace_folder", named)
    monkeypatch.setattr(SealedFile, "write", written)
    saved(tmp_path / "run", asynchronous=asynchronous)[0].finish_checkpoint()
    ((there, listed, problem),) = found
    assert (set(there), problem) == (listed, None)
    expected = {name: size for name, size in sizes(tmp_path / "other" / "step_1").items() if "state-" in name}
    assert {name: size for name, size in there.items() if "state-" in name} == expected != {}


def test_a_checkpoint_that_is_a_file_is_named(tmp_path: Path) -> None:
    strategy, model = saved(tmp_path / "runs")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        strategy.load_ckpt(model, tmp_path / "file")


def test_the_count_of_rollouts_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    """It enters the seeds of samples."""
    strategy, model = saved(tmp_path)
    strategy.engine_host.load_state_dict({"rollout_step": 5, "weight_version": 3})
    strategy.save_ckpt(model, tmp_path, tag="here")
    folder = tmp_path / "here"
    for kind in ("json", "safetensors"):  # as if two ranks had saved
        shutil.copy(folder / "ranks" / f"0.{kind}", folder / "ranks" / f"1.{kind}")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "world_size": 2}))
    other, again = FakeStrategy(), nn.Linear(64, 64)
    other.create_optimizer(again)
    assert other.load_ckpt(again, tmp_path, tag="here").world_size == 2
    assert other.engine_host.state_dict() == {"rollout_step": 5, "weight_version": 3}
