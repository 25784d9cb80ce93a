"""``lightrft convert`` itself, all six ways. What real backends write goes through it in the integration tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft.cli.main import main
from lightrft.data.tasks import build_model, build_tokenizer
from lightrft.strategy import FakeStrategy

Shown = pytest.CaptureFixture[str]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    build_model(layers=1, width=64).save_pretrained(tmp_path / "hub")
    build_tokenizer().save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture
def trained(hub: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint after one step, and everything that it holds."""
    strategy, model, optimizer = ready(hub)
    rows = torch.randint(3, 12, (2, 8), generator=torch.Generator().manual_seed(0))
    strategy.backward(model(input_ids=rows, labels=rows).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    strategy.save_ckpt(model, tmp_path / "run", client_state={"step": 1}, tokenizer=build_tokenizer())
    return tmp_path / "run", state_of(strategy, model, optimizer)


def ready(hub: Path) -> tuple[FakeStrategy, Any, Any]:
    strategy = FakeStrategy(seed=3)
    model = strategy.prepare(AutoModelForCausalLM.from_pretrained(hub))
    return strategy, model, strategy.create_optimizer(model, lr=1e-2)


def state_of(strategy: FakeStrategy, model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for item in strategy.iter_state(model, optimizer):
        state[f"weight/{item.name}"] = item.weight.clone()
        state |= {f"{kind}/{item.name}": value.clone() for kind, value in item.moments.items()}
        state[f"step/{item.name}"] = torch.tensor(item.step)
    return state


def loaded(hub: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    strategy, model, optimizer = ready(hub)
    strategy.load_ckpt(model, checkpoint)
    return state_of(strategy, model, optimizer)


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("weight/")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def converted(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


@pytest.mark.parametrize(("first", "second"), [("ds", "fsdp"), ("fsdp", "ds")])
def test_a_checkpoint_keeps_everything_through_both_formats_and_its_weights_into_a_hub_folder(
    trained: tuple[Path, dict[str, torch.Tensor]], hub: Path, tmp_path: Path, first: str, second: str, capsys: Shown
) -> None:
    """fsdp2ds, ds2fsdp, ds2hf, fsdp2hf."""
    run, expected = trained
    assert any(name.startswith("exp_avg") for name in expected)
    converted(run, tmp_path / "one", "--to", first, "--verify")
    converted(tmp_path / "one", tmp_path / "two", "--to", second, "--verify")
    assert "each compared with its source" in capsys.readouterr().out
    assert_equal(loaded(hub, tmp_path / "two"), expected)
    converted(tmp_path / "two", tmp_path / "model", "--verify")  # --to hf is the default
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_equal({f"weight/{n}": v for n, v in model.named_parameters()}, weights(expected))
    text = "123="
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids == build_tokenizer()(text).input_ids


@pytest.mark.parametrize("to", ["ds", "fsdp"])
def test_a_hub_folder_becomes_a_start_for_either_backend(hub: Path, tmp_path: Path, to: str) -> None:
    """hf2ds, hf2fsdp."""
    converted(hub, tmp_path / "start", "--to", to, "--verify")
    strategy, model, optimizer = ready(hub)
    expected = weights(state_of(strategy, model, optimizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    strategy.load_ckpt(model, tmp_path / "start")
    assert_equal(weights(state_of(strategy, model, optimizer)), expected)


def test_an_existing_folder_stays_unless_forced(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: Shown
) -> None:
    run, _ = trained
    target = tmp_path / "model"
    converted(run, target)
    (target / "mine.txt").write_text("kept")
    assert main(["convert", str(run), str(target)]) == 2
    shown = capsys.readouterr().err
    assert "--force" in shown
    assert "Traceback" not in shown
    assert (target / "mine.txt").read_text() == "kept"
    converted(run, target, "--force", "--dtype", "bfloat16")
    assert not (target / "mine.txt").exists()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, capsys: Shown) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err.lstrip()  # older rich ends an empty progress with a line
    assert shown.startswith("lightrft: ")
    assert "no checkpoint" in shown
    assert not (tmp_path / "out").exists()
