"""DCP checkpoints: any number of ranks, no unsafe pickle, errors that are ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.fsdp import FSDPV2Strategy
from lightrft.strategy.dcp_files import METADATA
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import tiny_model
from lightrft.testing.faults import cut

SETTINGS = {"seed": 3, "dist_timeout": 60.0, "max_norm": 0.5, "micro_train_batch_size": 2, "train_batch_size": 4}


def prepared(seed: int = 0, **settings: Any) -> tuple[FSDPV2Strategy, nn.Module, Any]:
    strategy = FSDPV2Strategy(**{**SETTINGS, **settings})
    model = strategy.prepare(tiny_model("qwen2_tied", seed=seed))
    return strategy, model, strategy.create_optimizer(model, lr=1e-2)


def train(strategy: FSDPV2Strategy, model: nn.Module, optimizer: Any, steps: range) -> None:
    per_rank = 4 // strategy.world_size
    micro = strategy.config.micro_train_batch_size
    for step in steps:
        rows = torch.randint(7, 512, (4, 8), generator=torch.Generator().manual_seed(step))
        mine = rows[strategy.rank * per_rank : (strategy.rank + 1) * per_rank]
        for part in mine.split(micro):
            strategy.backward(model(input_ids=part, labels=part).loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, None)


def state_of(strategy: FSDPV2Strategy, model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for item in strategy.iter_state(model, optimizer):
        state[item.name] = item.weight
        state |= {f"{kind}/{item.name}": value for kind, value in item.moments.items()}
        state[f"step/{item.name}"] = torch.tensor(item.step)
    return state


def save(folder: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    strategy, model, optimizer = prepared(**settings)
    train(strategy, model, optimizer, range(2))
    strategy.save_ckpt(model, folder, tag="two")
    train(strategy, model, optimizer, range(2, 4))
    return state_of(strategy, model, optimizer)


def resume(folder: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    strategy, model, optimizer = prepared(seed=9, **settings)
    strategy.load_ckpt(model, folder, tag="two")
    train(strategy, model, optimizer, range(2, 4))
    return state_of(strategy, model, optimizer)


VARIANTS: list[Any] = [
    pytest.param({}, marks=pytest.mark.full),  # as every backend does: CheckpointClaims
    {"bf16": True},
    {"bf16": True, "use_mp_opt": True},
    {"fp16": True},
    {"adam_offload": True},
    {"fsdp_cpu_offload": True},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(settings) or "fp32")
def test_a_resumed_run_goes_on_bit_for_bit(ranks: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = ranks.run(save, str(tmp_path), settings)[0]
    for found in ranks.run(resume, str(tmp_path), settings):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (1, 2)])
def test_a_checkpoint_moves_to_another_number_of_ranks(
    rank_pools: Any, tmp_path: Path, saved: int, loaded: int
) -> None:
    expected = rank_pools(saved).run(save, str(tmp_path), {})[0]
    for found in rank_pools(loaded).run(resume, str(tmp_path), {}):
        for name, value in expected.items():
            torch.testing.assert_close(found[name].float(), value.float(), atol=2e-5, rtol=1e-4, msg=name)


def with_the_users_own_optimizer(folder: str, name: str) -> None:
    kinds: dict[str, Any] = {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    }
    strategy = FSDPV2Strategy(**SETTINGS)
    found = []
    for seed in (0, 9):
        model = strategy.prepare(tiny_model("qwen2_tied", seed=seed))
        optimizer = kinds[name](model)
        if seed == 0:
            train(strategy, model, optimizer, range(2))
            strategy.save_ckpt(model, folder, tag="two", optimizer=optimizer)
        else:
            strategy.load_ckpt(model, folder, tag="two", optimizer=optimizer)
        train(strategy, model, optimizer, range(2, 4))
        found.append(state_of(strategy, model, optimizer))
        other = strategy.prepare(tiny_model("qwen2_tied", seed=5))
        other_optimizer = kinds[name](other)
        strategy.load_state(other, other_optimizer, list(strategy.iter_state(model, optimizer)))
        copied = state_of(strategy, other, other_optimizer)
        assert all(torch.equal(copied[key], value) for key, value in found[-1].items())
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


@pytest.mark.parametrize("name", [pytest.param("AdamW", marks=pytest.mark.full), "SGD"])
def test_an_optimizer_that_the_user_brought_is_saved_and_resumed(ranks: Any, tmp_path: Path, name: str) -> None:
    ranks.run(with_the_users_own_optimizer, str(tmp_path), name)


def into_another_optimizer(folder: str) -> str:
    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(tiny_model("qwen2_tied"))
    train(strategy, model, momentum := torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), range(1))
    strategy.save_ckpt(model, folder, tag="two", optimizer=momentum)
    other = strategy.prepare(tiny_model("qwen2_tied"))
    with pytest.raises(CheckpointError, match="does not use") as caught:
        strategy.load_ckpt(other, folder, tag="two", optimizer=strategy.create_optimizer(other))
    return str(caught.value)


def test_another_optimizers_state_is_refused(ranks: Any, tmp_path: Path) -> None:
    assert "momentum_buffer" in ranks.run(into_another_optimizer, str(tmp_path))[0]


def in_the_background(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    strategy, model, optimizer = prepared()
    train(strategy, model, optimizer, range(2))
    expected = state_of(strategy, model, optimizer)
    strategy.save_ckpt(model, folder, tag="two", asynchronous=True)
    train(strategy, model, optimizer, range(2, 4))  # goes on meanwhile, with collectives of its own
    assert strategy.finish_checkpoint()
    strategy.load_ckpt(model, folder, tag="two")
    return expected, state_of(strategy, model, optimizer)


def test_an_asynchronous_save_holds_the_state_it_was_called_with(ranks: Any, tmp_path: Path) -> None:
    for expected, found in ranks.run(in_the_background, str(tmp_path)):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def under_masters(folder: str) -> None:
    strategy, model, optimizer = prepared(bf16=True, use_mp_opt=True)
    train(strategy, model, optimizer, range(2))
    strategy.save_ckpt(model, folder, tag="two")
    expected = state_of(strategy, model, None)
    loads = (
        lambda: strategy.load_ckpt(other, folder, tag="two", load_module_only=True),
        lambda: strategy.load_state(other, None, strategy.iter_state(model)),
        lambda: strategy.import_weights(other, hub_weights()),
    )

    def hub_weights() -> Iterator[tuple[str, torch.Tensor]]:
        plan = UpdatePlan(version=1, specs=tuple(strategy.export_spec(model)))
        for bucket in strategy.export_weights(model, plan):
            yield from bucket.tensors.items()

    for load in loads:
        other = strategy.prepare(tiny_model("qwen2_tied", seed=9))
        other_optimizer = strategy.create_optimizer(other, lr=0.0)
        train(strategy, other, other_optimizer, range(1))
        load()
        train(strategy, other, other_optimizer, range(1))  # at lr 0 the masters must not bring the old weights back
        for name, value in state_of(strategy, other, None).items():
            assert torch.equal(value, expected[name]), name
        strategy.load_state(other, other_optimizer, strategy.iter_state(model, optimizer))
        copied = state_of(strategy, other, other_optimizer)
        assert all(torch.equal(copied[name], value) for name, value in state_of(strategy, model, optimizer).items())


def test_masters_follow_what_is_loaded_with_an_optimizer_or_without(ranks: Any, tmp_path: Path) -> None:
    ranks.run(under_masters, str(tmp_path))


def write_raw(folder: str) -> None:
    strategy, model, optimizer = prepared()
    train(strategy, model, optimizer, range(1))
    strategy.write_state(strategy.record(model), Path(folder), asynchronous=False)


def read_raw(folder: str) -> str:
    strategy, model, _ = prepared()
    with pytest.raises(CheckpointError) as caught:
        strategy.read_state(strategy.record(model), Path(folder), optimizer=True)
    return str(caught.value)


def test_a_truncated_file_is_a_checkpoint_error_that_names_it(ranks: Any, tmp_path: Path) -> None:
    ranks.run(write_raw, str(tmp_path))
    cut(tmp_path / "__1_0.distcp")
    for message in ranks.run(read_raw, str(tmp_path)):
        assert str(tmp_path) in message
        assert "rank" in message


def test_missing_metadata_is_a_checkpoint_error(ranks: Any, tmp_path: Path) -> None:
    ranks.run(write_raw, str(tmp_path))
    (tmp_path / METADATA).unlink()
    for message in ranks.run(read_raw, str(tmp_path)):
        assert METADATA in message


def read_another(folder: str) -> str:
    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(tiny_model("qwen2", intermediate_size=96))
    with pytest.raises(CheckpointError) as caught:
        strategy.read_state(strategy.record(model), Path(folder), optimizer=True)
    return str(caught.value)


def test_another_models_checkpoint_is_refused_with_the_first_difference(ranks: Any, tmp_path: Path) -> None:
    ranks.run(write_raw, str(tmp_path))
    for message in ranks.run(read_another, str(tmp_path)):
        assert "mlp.gate_proj.weight" in message
        assert "[128, 64]" in message
        assert "[96, 64]" in message
