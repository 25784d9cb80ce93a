"""Conversion in one process: every way there and back gives the same bits, and what is bad is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint_folders import FORMAT, MANIFEST
from lightrft.strategy.conversion import Conversion, convert, parse_size
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.sealed_file import SealedFile
from lightrft.testing import tiny_model
from lightrft.testing.faults import calling_first, cut, flip_bit
from lightrft.utils.ckpt_scripts import command

KINDS = ["qwen2", "qwen2_tied", "qwen3_moe", "qwen2_5_vl"]


class Wrapped(nn.Module):
    """Keeps its transformers model as an actor does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def trained(kind: str = "qwen2", *, wrapped: bool = False, seed: int = 0) -> tuple[FakeStrategy, Any, Any]:
    """(strategy, model, optimizer), two steps from its start."""
    strategy = FakeStrategy(seed=3, max_norm=0.5)
    model: Any = tiny_model(kind, seed=seed)
    model = strategy.prepare(Wrapped(model) if wrapped else model)
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    for step in range(2):
        rows = torch.randint(7, 512, (2, 8), generator=torch.Generator().manual_seed(step))
        strategy.backward(model(input_ids=rows, labels=rows).loss, model, optimizer)
        strategy.optimizer_step(optimizer, model)
    return strategy, model, optimizer


def state_of(strategy: FakeStrategy, model: Any, optimizer: Any = None) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for item in strategy.iter_state(model, optimizer):
        state[f"weight/{item.name}"] = item.weight
        state |= {f"{kind}/{item.name}": value for kind, value in item.moments.items()}
        state[f"step/{item.name}"] = torch.tensor(item.step)
    return state


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, FakeStrategy, Any, Any]:
    strategy, model, optimizer = trained()
    strategy.save_ckpt(model, tmp_path / "run", client_state={"step": 2})
    return tmp_path / "run" / "step_2", strategy, model, optimizer


# ---- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_folder_made_of_a_checkpoint_is_what_save_pretrained_writes(
    tmp_path: Path, kind: str, wrapped: bool
) -> None:
    strategy, model, _ = trained(kind, wrapped=wrapped)
    strategy.save_ckpt(model, tmp_path / "run")
    done = convert(tmp_path / "run", tmp_path / "hub", verify=True)
    inner = model.model if wrapped else model
    inner.save_pretrained(tmp_path / "expected")
    with (
        safe_open(tmp_path / "expected" / "model.safetensors", "pt") as expected,
        safe_open(tmp_path / "hub" / "model.safetensors", "pt") as found,
    ):
        assert set(found.keys()) == set(expected.keys())
        assert done.tensors == len(found.keys())
        for name in expected.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(found.get_tensor(name), expected.get_tensor(name)), name
    header = int.from_bytes((tmp_path / "hub" / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0, "a reader that maps the file finds its tensors aligned"
    again = type(inner).from_pretrained(tmp_path / "hub")
    rows = torch.arange(7, 15).view(1, 8)
    with torch.no_grad():
        assert torch.equal(again(input_ids=rows).logits, inner(input_ids=rows).logits)


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3_moe"])
@pytest.mark.parametrize("to", ["ds", "fsdp"])
def test_a_hub_folder_becomes_a_checkpoint_that_a_wrapped_model_loads(tmp_path: Path, kind: str, to: Any) -> None:
    hub = tiny_model(kind, seed=4)
    hub.save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "made", to=to, verify=True)
    strategy, model, _ = trained(kind, wrapped=True)
    loaded = strategy.load_ckpt(model, tmp_path / "made")
    assert loaded.client_state == {}
    assert_same(
        state_of(strategy, model.model),
        state_of(strategy, strategy.prepare(tiny_model(kind, seed=4))),
    )


@pytest.mark.parametrize("to", ["ds", "fsdp"])
def test_a_checkpoint_of_the_other_kind_goes_on_bit_for_bit(
    tmp_path: Path, saved: tuple[Path, FakeStrategy, Any, Any], to: Any
) -> None:
    folder, strategy, model, optimizer = saved
    done = convert(folder, tmp_path / "other", to=to, verify=True)
    assert str(done).startswith(str(folder))
    convert(tmp_path / "other", tmp_path / "back", to="ds", verify=True)
    for made in ("other", "back"):
        other, resumed, its_optimizer = trained(seed=9)
        assert other.load_ckpt(resumed, tmp_path / made).client_state == {"step": 2}
        assert_same(state_of(other, resumed, its_optimizer), state_of(strategy, model, optimizer))


def test_the_newest_checkpoint_is_converted_unless_a_tag_names_another(
    tmp_path: Path, saved: tuple[Path, FakeStrategy, Any, Any]
) -> None:
    folder, strategy, model, _ = saved
    model.lm_head.weight.data.zero_()
    strategy.save_ckpt(model, folder.parent, client_state={"step": 3})
    for tag, empty in ((None, True), ("step_2", False)):
        convert(folder.parent, tmp_path / f"hub of {tag}", tag=tag)
        with safe_open(tmp_path / f"hub of {tag}" / "model.safetensors", "pt") as found:
            assert found.get_tensor("lm_head.weight").any() != empty


def test_a_hub_folder_survives_the_way_through_every_other_format(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer.json").write_text('{"a": 1}')
    convert(tmp_path / "hub", tmp_path / "ds", to="ds")
    convert(tmp_path / "ds", tmp_path / "fsdp", to="fsdp")
    convert(tmp_path / "fsdp", tmp_path / "again")
    before, after = files_of(tmp_path / "hub"), files_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert before["tokenizer.json"] == after["tokenizer.json"]
    assert json.loads(before["config.json"]) == json.loads(after["config.json"])
    with (
        safe_open(tmp_path / "hub" / "model.safetensors", "pt") as expected,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as found,
    ):
        for name in expected.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(found.get_tensor(name), expected.get_tensor(name)), name


def test_weights_are_cast_and_cut_into_files_as_asked(tmp_path: Path, saved: Any) -> None:
    folder, _, model, _ = saved
    done = convert(folder, tmp_path / "hub", dtype=torch.bfloat16, max_shard_size="100KB", verify=True)
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == done.nbytes
    largest = max(p.numel() * 2 for p in model.parameters())
    assert all((tmp_path / "hub" / name).stat().st_size < max(100_000, largest) + 4096 for name in files)
    again = type(model).from_pretrained(tmp_path / "hub")
    assert again.dtype == torch.bfloat16
    for (name, found), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected.to(torch.bfloat16)), name


def test_the_actor_of_several_models_is_taken_and_others_by_name(tmp_path: Path) -> None:
    strategy, actor, _ = trained()
    critic = strategy.prepare(tiny_model("qwen2", seed=5))
    strategy.save_ckpt({"critic": critic, "actor": actor}, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "actor")
    convert(tmp_path / "run", tmp_path / "critic", model="critic")
    for name, model in (("actor", actor), ("critic", critic)):
        again = type(model).from_pretrained(tmp_path / name)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(CheckpointError, match=r"no model 'reward'.*critic, actor"):
        convert(tmp_path / "run", tmp_path / "reward", model="reward")


def test_a_tokenizer_saved_with_the_model_comes_along(tmp_path: Path) -> None:
    from lightrft.testing.tiny_models import tiny_tokenizer

    strategy, model, _ = trained()
    strategy.save_ckpt(model, tmp_path / "run", tokenizer=tiny_tokenizer())
    convert(tmp_path / "run", tmp_path / "hub")
    assert (tmp_path / "hub" / "tokenizer.json").is_file()
    assert (tmp_path / "hub" / "generation_config.json").is_file()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_bare_dcp_folder_is_converted_with_a_configuration_from_elsewhere(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = tiny_model("qwen2")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="--pretrain DIR"):
        convert(tmp_path / "dcp", tmp_path / "hub")
    convert(tmp_path / "dcp", tmp_path / "hub", pretrain=tmp_path / "base", verify=True)
    again = type(model).from_pretrained(tmp_path / "hub")
    for (name, found), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    strategy = FakeStrategy()
    other = strategy.prepare(Wrapped(tiny_model("qwen2", seed=9)))
    strategy.load_ckpt(other, tmp_path / "dcp")
    assert torch.equal(other.model.lm_head.weight, model.lm_head.weight)


def test_a_module_that_is_none_of_transformers_becomes_its_weights(tmp_path: Path) -> None:
    strategy, model = FakeStrategy(), nn.Linear(3, 2)
    strategy.save_ckpt(model, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", verify=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), model.weight)


def test_a_hub_folder_can_be_loaded_as_a_checkpoint(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", seed=4).save_pretrained(tmp_path / "hub")
    strategy, model, _ = trained("qwen3_moe", wrapped=True)
    strategy.load_ckpt(model, tmp_path / "hub")
    expected = strategy.prepare(tiny_model("qwen3_moe", seed=4))
    assert_same(state_of(strategy, model.model), state_of(strategy, expected))


# ---- what is bad is named --------------------------------------------------------------------------------------------
def test_an_existing_target_is_replaced_only_when_told_to(tmp_path: Path, saved: Any) -> None:
    folder, *_ = saved
    target = tmp_path / "hub"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match=r"exists.*--force"):
        convert(folder, target)
    with pytest.raises(CheckpointError, match="--pretrain"):
        convert(_without_record(folder, tmp_path / "bare"), target, force=True)
    assert files_of(target) == {"precious": b"mine"}, "a conversion that fails leaves the old one"
    convert(folder, target, force=True)
    assert "precious" not in files_of(target)
    with pytest.raises(CheckpointError, match="contains the source"):
        convert(folder, folder.parent, force=True)
    assert not list(tmp_path.glob(".*"))


def _without_record(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    (copy / MANIFEST).unlink()
    (copy / "model" / "layout.json").unlink()
    return copy / "model"


@pytest.mark.parametrize("to", ["ds", "fsdp", "hf"])
def test_a_damaged_checkpoint_is_refused_with_the_file(tmp_path: Path, saved: Any, to: Any) -> None:
    folder, *_ = saved
    shard = next(folder.glob("model/*.safetensors"))
    flip_bit(shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} was altered"):
        convert(folder, tmp_path / "out", to=to)
    cut(shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} has"):
        convert(folder, tmp_path / "out", to=to)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        convert(folder, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_without_a_manifest_a_cut_or_missing_file_is_named_too(tmp_path: Path, saved: Any) -> None:
    folder, *_ = saved
    (folder / MANIFEST).unlink()
    shard = next(folder.glob("model/*.safetensors"))
    cut(shard)
    with pytest.raises(CheckpointError, match=f"{shard.name}.* truncated"):
        convert(folder / "model", tmp_path / "out", to="fsdp")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: rank 0's file is missing"):
        convert(folder / "model", tmp_path / "out", to="fsdp")


def test_a_hub_folder_that_lacks_a_file_or_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "hub", max_shard_size="100KB")
    (tmp_path / "hub" / "model-00002-of-00002.safetensors").exists()
    lost = sorted((tmp_path / "hub").glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {lost.name}, which .* lists"):
        convert(tmp_path / "hub", tmp_path / "ds", to="ds")
    lost.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"{lost.name}: is truncated"):
        convert(tmp_path / "hub", tmp_path / "ds", to="ds")
    lost.write_bytes(content)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"another model's weights: .*mlp.*\[128, 64\] there, \[96, 64\] here"):
        convert(tmp_path / "hub", tmp_path / "ds", to="ds")
    assert not (tmp_path / "ds").exists()


def test_what_is_no_checkpoint_is_answered_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    known = "manifest.json.*Hugging Face.*state.json.*\\.metadata"
    with pytest.raises(CheckpointError, match=rf"no checkpoint; known.*{known}"):
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "checkpoints" / "step_1" / MANIFEST).write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(CheckpointError, match=rf"no checkpoint; did you mean \S*run/checkpoints\?; known.*{known}"):
        convert(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    tiny_model("qwen2").save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"Hugging Face folder already.*--to ds"):
        convert(tmp_path / "hub", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is a hf source.*not ds"):
        convert(tmp_path / "hub", tmp_path / "out", to="fsdp", expect="ds")


def test_an_altered_write_is_found_by_comparing(tmp_path: Path, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrft.strategy import hub_files

    folder, *_ = saved
    original = hub_files.write_hub

    def write_and_spoil(source: Any, tensors: Any, out: Path, **options: Any) -> None:
        original(source, tensors, out, **options)
        flip_bit(out / "model.safetensors")

    monkeypatch.setattr(hub_files, "write_hub", write_and_spoil)
    with pytest.raises(CheckpointError, match="differs from its source"):
        convert(folder, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("owner", "call"), [(Path, "mkdir"), (SealedFile, "write")])
@pytest.mark.parametrize("to", ["hf", "ds"])
def test_a_full_disk_is_explained_by_the_command_too(
    tmp_path: Path, saved: Any, capsys: pytest.CaptureFixture[str], owner: Any, call: str, to: str
) -> None:
    folder, *_ = saved

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with calling_first(owner, call, full):
        assert command.main("ds", to, [str(folder), str(tmp_path / "new" / "out")]) == command.EXIT_FAILED
    told = capsys.readouterr().err
    assert told.startswith(f"lightrft: {tmp_path / 'new' / 'out'} could not be written: ")
    assert "It takes about" in told
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("text", "nbytes"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), (1234, 1234)])
def test_sizes_are_read_with_their_units(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 parsecs", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)


# ---- as a command ----------------------------------------------------------------------------------------------------
def test_the_scripts_convert_and_say_what_they_did(tmp_path: Path, saved: Any) -> None:
    folder, _, model, _ = saved
    run = [sys.executable, "-m", "lightrft.utils.ckpt_scripts.ds2hf"]
    done = subprocess.run([*run, str(folder), str(tmp_path / "hub")], capture_output=True, text=True, check=True)
    assert "27 tensors" in done.stdout
    assert torch.equal(type(model).from_pretrained(tmp_path / "hub").lm_head.weight, model.lm_head.weight)
    refused = subprocess.run([*run, str(folder), str(tmp_path / "hub")], capture_output=True, text=True, check=False)
    assert refused.returncode == command.EXIT_FAILED
    assert "--force" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["ds2hf", "fsdp2hf", "hf2ds", "hf2fsdp", "ds2fsdp", "fsdp2ds"])
def test_every_script_explains_itself(name: str) -> None:
    __import__(f"lightrft.utils.ckpt_scripts.{name}")
    expect, to = name.split("2")
    with pytest.raises(SystemExit):
        command.main(expect, to, ["--help"])


KILLED = """
import os, signal, sys
from lightrft.strategy import conversion, hub_files
original = hub_files.TensorFileWriter.write
count = 0
def write(self, name, tensor):
    global count
    count += 1
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, name, tensor)
hub_files.TensorFileWriter.write = write
conversion.convert(sys.argv[1], sys.argv[2], force=True)
"""


def test_a_conversion_killed_half_way_leaves_the_old_folder_and_the_next_one_works(tmp_path: Path, saved: Any) -> None:
    folder, *_ = saved
    target = tmp_path / "hub"
    convert(folder, target)
    before = files_of(target)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files_of(target) == before
    convert(folder, target, force=True, verify=True)
    assert files_of(target) == before
    assert os.listdir(tmp_path).count("hub") == 1
    assert not list(tmp_path.glob(".hub*"))


# Not ru_maxrss: it begins with the peak of the process that started this one.
MEMORY = """
import re, sys, torch
from pathlib import Path
from lightrft.strategy.conversion import convert
import lightrft.strategy.dcp_files, lightrft.strategy.hub_layout
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = peak()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], verify=True)
print(peak() - before)
"""


class Large(nn.Module):
    """24 equal layers of 8 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 1024, bias=False) for _ in range(24))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak: use Linux")
@pytest.mark.parametrize("way", [("ds", "fsdp"), pytest.param(("fsdp", "ds"), marks=pytest.mark.full)], ids="-".join)
def test_memory_is_that_of_a_few_tensors_whatever_the_model(tmp_path: Path, way: tuple[str, str]) -> None:
    strategy = FakeStrategy()
    strategy.save_ckpt(strategy.prepare(Large()), tmp_path / "run", tag="ds")
    convert(tmp_path / "run", tmp_path / "run" / "fsdp", to="fsdp")
    command_line = [sys.executable, "-c", MEMORY, str(tmp_path / "run" / way[0]), str(tmp_path / "out"), way[1]]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    largest, whole = 8 * 2**20, 24 * 8 * 2**20
    assert 0 < int(done.stdout) < 3 * largest + 64 * 2**20 < whole


def test_conversion_is_a_dataclass_that_reads_well() -> None:
    done = Conversion(
        source=Path("a"), target=Path("b"), read="dcp", to="hf", tensors=3, nbytes=2_000_000, seconds=1.5, verified=True
    )
    assert str(done) == "a (dcp) -> b (hf): 3 tensors, 2.0 MB in 1.5 s, each compared with its source"
