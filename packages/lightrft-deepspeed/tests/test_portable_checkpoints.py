"""Checkpoints between ZeRO stages, numbers of ranks, and what DeepSpeed's own engine saves."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.deepspeed.environment import join_process_group, load_deepspeed
from lightrft.deepspeed.native_files import open_native
from lightrft.strategy import FakeStrategy
from lightrft.strategy.conversion import convert
from lightrft.strategy.errors import CheckpointError
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import tiny_model
from lightrft.testing.faults import cut
from lightrft.testing.ranks import RankFailure

SETTINGS = {"seed": 3, "dist_timeout": 120.0, "max_norm": 0.5, "micro_train_batch_size": 1, "train_batch_size": 4}
State = dict[str, torch.Tensor]
# What stage 2 keeps lies in its files as stage 1's does.
on_each_layout = pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.full), 3])


class Wrapped(nn.Module):
    """Keeps its transformers model as an actor does; one parameter is frozen, one buffer persists."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = tiny_model("qwen2_tied", seed=seed)
        self.model.model.norm.weight.requires_grad_(False)
        self.register_buffer("scale", torch.arange(5.0) + seed)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def state_of(strategy: Any, model: nn.Module, optimizer: Any) -> State:
    state: State = {}
    for item in strategy.iter_state(model, optimizer):
        state[f"weight/{item.name}"] = item.weight.float()
        state |= {f"{kind}/{item.name}": value for kind, value in item.moments.items()}
        state[f"step/{item.name}"] = torch.tensor(item.step)
    return state


def prepared(seed: int = 0, **settings: Any) -> tuple[DeepspeedStrategy, Any, Any]:
    strategy = DeepspeedStrategy(**{**SETTINGS, **settings})
    model = strategy.prepare(Wrapped(seed))
    return strategy, model, strategy.create_optimizer(model, lr=1e-2)


def train(strategy: DeepspeedStrategy, model: Any, optimizer: Any, steps: range) -> None:
    each = 4 // strategy.world_size
    for step in steps:
        rows = torch.randint(7, 512, (4, 8), generator=torch.Generator().manual_seed(step))
        for part in rows[strategy.rank * each : (strategy.rank + 1) * each].split(1):
            strategy.backward(model(input_ids=part, labels=part).loss, model, optimizer)
            strategy.optimizer_step(optimizer, model)


def save(folder: str, settings: dict[str, Any]) -> State:
    strategy, model, optimizer = prepared(**settings)
    train(strategy, model, optimizer, range(2))
    strategy.save_ckpt(model, folder, tag="two", client_state={"step": 2})
    return state_of(strategy, model, optimizer)


def load(folder: str, settings: dict[str, Any], trained: int = 0) -> State:
    strategy, model, optimizer = prepared(seed=9, **settings)
    train(strategy, model, optimizer, range(5, 5 + trained))
    strategy.load_ckpt(model, folder)
    found = state_of(strategy, model, optimizer)
    train(strategy, model, optimizer, range(2, 3))  # what was loaded is what trains
    assert state_of(strategy, model, optimizer).keys() == found.keys()
    return found


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("saved", "loaded", "ranks_before", "ranks_after"),
    [
        *((1, 3, 1, 2), (2, 3, 2, 4), (3, 2, 4, 2)),
        *(pytest.param(*moves, marks=pytest.mark.full) for moves in ((3, 1, 2, 1), (1, 2, 2, 4))),
    ],
    ids=lambda value: str(value),
)
def test_state_moves_between_stages_and_numbers_of_ranks_bit_for_bit(
    rank_pools: Any, tmp_path: Path, saved: int, loaded: int, ranks_before: int, ranks_after: int
) -> None:
    expected = rank_pools(ranks_before).run(save, str(tmp_path), {"zero_stage": saved})[0]
    for found in rank_pools(ranks_after).run(load, str(tmp_path), {"zero_stage": loaded}, 1):
        assert_same(found, expected)


@on_each_layout
def test_a_16_bit_run_keeps_its_fp32_weights(ranks: Any, tmp_path: Path, stage: int) -> None:
    settings = {"zero_stage": stage, "bf16": True}
    expected = ranks.run(save, str(tmp_path), settings)[0]
    for found in ranks.run(load, str(tmp_path), settings):
        assert_same(found, expected)


def test_every_rank_writes_its_own_part_and_nothing_twice(ranks: Any, tmp_path: Path) -> None:
    expected = ranks.run(save, str(tmp_path), {"zero_stage": 3})[0]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "two" / "model").glob("state-*.safetensors"))]
    whole = sum(value.numel() * 4 for name, value in expected.items() if not name.startswith("step/"))
    assert len(sizes) == 2
    assert whole <= sum(sizes) < whole + 40_000  # headers
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_zero_checkpoint_becomes_a_hub_folder_which_a_larger_model_refuses(ranks: Any, tmp_path: Path) -> None:
    expected = ranks.run(save, str(tmp_path / "run"), {"zero_stage": 3})[0]
    convert(tmp_path / "run", tmp_path / "hub", expect="ds", verify=True)
    again = type(tiny_model("qwen2_tied")).from_pretrained(tmp_path / "hub")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[f"weight/model.{name}"]), name
    convert(tmp_path / "hub", tmp_path / "ds", to="ds")
    # The hub has no place for the wrapper's own buffer, and a model that has one is not half filled.
    with pytest.raises(RankFailure, match=r"CheckpointError.*another model: scale is absent there"):
        ranks.run(load, str(tmp_path / "ds"), {"zero_stage": 3})


# ---- DeepSpeed's own files -------------------------------------------------------------------------------------------
def save_raw(folder: str, stage: int, bf16: bool) -> State:
    """A script that has never heard of LightRFT."""
    deepspeed = load_deepspeed()
    torch.distributed.init_process_group("gloo")
    join_process_group()
    model = Wrapped(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-3),
        lr_scheduler=torch.optim.lr_scheduler.LinearLR,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for step in range(3):
        rows = torch.randint(7, 512, (2, 8), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    engine.save_checkpoint(folder)
    from lightrft.deepspeed import parameters

    state: State = {}
    for item in parameters.iter_state(engine.module, engine.optimizer):
        state[f"weight/{item.name}"] = item.weight.float()
        state |= {f"{kind}/{item.name}": value for kind, value in item.moments.items()}
        state[f"step/{item.name}"] = torch.tensor(item.step)
    return state


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.full), True], ids=["fp32", "bf16"])
@on_each_layout
def test_what_deepspeeds_engine_saved_is_read_whole(ranks: Any, tmp_path: Path, stage: int, bf16: bool) -> None:
    expected = ranks.run(save_raw, str(tmp_path), stage, bf16)[0]
    source = open_native(tmp_path)
    for name, value in expected.items():
        kind, _, rest = name.partition("/")
        found = torch.tensor(source.entries[rest].step) if kind == "step" else source.whole(rest, kind).float()
        assert torch.equal(found, value), name
    tiny_model("qwen2_tied").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"scale is .* there, absent here"):
        convert(tmp_path, tmp_path / "hub", pretrain=tmp_path / "base")
    strategy = FakeStrategy()
    model = strategy.prepare(Wrapped(9))
    optimizer = strategy.create_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    strategy.load_ckpt(model, tmp_path, scheduler=scheduler)
    assert scheduler.last_epoch == 3
    done = convert(tmp_path, tmp_path / "portable", to="fsdp", verify=True)
    assert done.read == "deepspeed"
    strategy.load_ckpt(model, tmp_path / "portable")
    assert_same(state_of(strategy, model, optimizer), expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_of_the_raw_engine_goes_on_here_at_another_number_of_ranks(
    rank_pools: Any, tmp_path: Path, stage: int
) -> None:
    expected = rank_pools(2).run(save_raw, str(tmp_path), stage, False)[0]
    (found,) = rank_pools(1).run(load, str(tmp_path), {"zero_stage": 5 - stage})
    assert_same(found, expected)


def imported_in_training() -> list[str]:
    """What is no longer what was imported after a step at a learning rate of 0."""
    strategy, model, optimizer = prepared(zero_stage=3, bf16=True)
    train(strategy, model, optimizer, range(2))

    def weights_of(one: Any) -> State:
        plan = UpdatePlan(version=1, specs=tuple(strategy.export_spec(one)))
        buckets = strategy.export_weights(one, plan)
        return {name: tensor.clone() for bucket in buckets for name, tensor in bucket.tensors.items()}

    other, expected = strategy.prepare(Wrapped(9)), weights_of(model)
    its_optimizer = strategy.create_optimizer(other, lr=0.0)
    train(strategy, other, its_optimizer, range(1))
    strategy.import_weights(other, iter(expected.items()))
    train(strategy, other, its_optimizer, range(1))
    return [name for name, tensor in weights_of(other).items() if not torch.equal(tensor, expected[name])]


def test_masters_follow_imported_weights(ranks: Any) -> None:
    assert ranks.run(imported_in_training) == [[], []]


class Bomb:
    """What a hostile pickle looks like."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_raw_files_that_are_damaged_missing_or_hostile_are_named(ranks: Any, tmp_path: Path) -> None:
    ranks.run(save_raw, str(tmp_path), 2, False)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    second = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = second.read_bytes()
    cut(second)
    with pytest.raises(CheckpointError, match=rf"{second.name}.*truncated"):
        open_native(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match="2 ranks wrote it, but there are optimizer states of 1"):
        open_native(tmp_path)
    second.write_bytes(content)
    first = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    first.rename(folder / "aside")
    with pytest.raises(CheckpointError, match="rank 0's file"):
        open_native(tmp_path)
    witness = tmp_path / "ran"
    torch.save({"optimizer_state_dict": Bomb(witness)}, first)
    with pytest.raises(CheckpointError, match=rf"{first.name}.*no checkpoint needs"):
        open_native(tmp_path)
    first.write_bytes(pickle.dumps(Bomb(witness)))
    with pytest.raises(CheckpointError, match=first.name):
        open_native(tmp_path)
    assert not witness.exists()


def go_on(folder: str, settings: dict[str, Any]) -> tuple[State, State]:
    """Steps 2 to 4 of a run that was not stopped, and of one that was."""
    strategy, model, optimizer = prepared(**settings)
    train(strategy, model, optimizer, range(2))
    strategy.save_ckpt(model, folder, tag="two")
    train(strategy, model, optimizer, range(2, 5))
    expected = state_of(strategy, model, optimizer)
    _, resumed, its_optimizer = other = prepared(seed=9, **settings)
    train(*other, range(5, 6))  # secondary shards and gathered parameters that must not shine through
    other[0].load_ckpt(resumed, folder, tag="two")
    train(*other, range(2, 5))
    return expected, state_of(other[0], resumed, its_optimizer)


@pytest.mark.parametrize(
    "settings",
    [{"zpg": 2, "bf16": True}, *(pytest.param(each, marks=pytest.mark.full) for each in ({"zpg": 2}, {"bf16": True}))],
    ids=str,
)
def test_what_stage_3_keeps_besides_its_shards_follows_a_load(
    ranks: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for expected, found in ranks.run(go_on, str(tmp_path), {"zero_stage": 3, **settings}):
        assert_same(found, expected)
