"""A checkpoint of any backend goes on under any other, at another number of ranks, after a kill too."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.strategy.conversion import convert
from lightrft.strategy.schedules import make_scheduler
from lightrft.testing import tiny_model
from lightrft.testing.ranks import announce

BACKENDS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"fsdp": True},
}
STEPS, LAST = 3, 6
State = dict[str, torch.Tensor]


class Actor(nn.Module):
    """Keeps its transformers model as an actor does."""

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__()
        self.model = tiny_model(kind, seed=seed)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def prepared(backend: str, seed: int, kind: str = "qwen3_moe") -> tuple[Any, Any, Any, Any]:
    """(strategy, model, optimizer, scheduler)."""
    settings = {"seed": 3, "max_norm": 0.5, "micro_train_batch_size": 1, "train_batch_size": 4, "dist_timeout": 120.0}
    strategy = get_strategy(StrategyConfig(**settings, **BACKENDS[backend]))
    model = strategy.prepare(Actor(seed, kind))
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    scheduler = make_scheduler("cosine", optimizer, LAST, 0.2)
    strategy.record(model).scheduler = scheduler
    return strategy, model, optimizer, scheduler


def train(strategy: Any, model: Any, optimizer: Any, scheduler: Any, steps: range) -> None:
    each = 4 // strategy.world_size
    for step in steps:
        rows = torch.randint(7, 512, (4, 8), generator=torch.Generator().manual_seed(step))
        for part in rows[strategy.rank * each : (strategy.rank + 1) * each].split(1):
            strategy.backward(model(input_ids=part, labels=part).loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, scheduler)


def state_of(strategy: Any, model: Any, optimizer: Any) -> State:
    state: State = {}
    for item in strategy.iter_state(model, optimizer):
        state[f"weight/{item.name}"] = item.weight
        state |= {f"{kind}/{item.name}": value for kind, value in item.moments.items()}
        state[f"step/{item.name}"] = torch.tensor(item.step)
    return state


def save(backend: str, folder: str) -> State:
    strategy, model, optimizer, scheduler = prepared(backend, seed=0)
    train(strategy, model, optimizer, scheduler, range(STEPS))
    strategy.save_ckpt(model, folder, client_state={"step": STEPS})
    return state_of(strategy, model, optimizer)


def load_on(backends: list[str], folder: str) -> dict[str, State]:
    found = {}
    for backend in backends:
        strategy, model, optimizer, scheduler = prepared(backend, seed=9)
        loaded = strategy.load_ckpt(model, folder)
        assert loaded.client_state == {"step": STEPS}
        assert scheduler.last_epoch == STEPS
        found[backend] = state_of(strategy, model, optimizer)
        train(strategy, model, optimizer, scheduler, range(STEPS, STEPS + 1))
    return found


def assert_same(found: State, expected: State, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name}"


@pytest.mark.parametrize(
    "saved",
    [pytest.param(name, marks=[pytest.mark.full] if name == "zero1" else []) for name in BACKENDS],  # as stage 2
)
def test_every_backend_reads_what_each_wrote_bit_for_bit(rank_pools: Any, tmp_path: Path, saved: str) -> None:
    """From 2 ranks to 1 and to 4, optimizer, scheduler and step included."""
    expected = rank_pools(2).run(save, saved, str(tmp_path))[0]
    others = [backend for backend in BACKENDS if backend != saved]
    for ranks, backends in ((1, others), (4, ["fsdp", "zero3"])):
        for of_rank in rank_pools(ranks).run(load_on, backends, str(tmp_path), timeout=300):
            for backend, found in of_rank.items():
                assert_same(found, expected, f"{saved} on 2 ranks -> {backend} on {ranks}")


def load_converted(backend: str, folder: str) -> State:
    strategy, model, optimizer, _ = prepared(backend, seed=9)
    strategy.load_ckpt(model, folder)
    return state_of(strategy, model, optimizer)


@pytest.mark.parametrize(("saved", "to", "loaded"), [("fsdp", "ds", "zero2"), ("zero3", "fsdp", "fsdp")])
def test_a_converted_checkpoint_is_the_other_backends_own(
    rank_pools: Any, tmp_path: Path, saved: str, to: Any, loaded: str
) -> None:
    expected = rank_pools(2).run(save, saved, str(tmp_path / "run"))[0]
    convert(tmp_path / "run", tmp_path / "other", to=to, verify=True)
    convert(tmp_path / "run", tmp_path / "hub", verify=True)
    for found in rank_pools(2).run(load_converted, loaded, str(tmp_path / "other")):
        assert_same(found, expected, f"{saved} -> {to}")
    convert(tmp_path / "hub", tmp_path / "start", to=to)
    for found in rank_pools(2).run(load_converted, loaded, str(tmp_path / "start")):
        for name, value in expected.items():
            if name.startswith("weight/"):
                assert torch.equal(found[name], value), name


def train_and_save(backend: str, folder: str) -> None:
    strategy, model, optimizer, scheduler = prepared(backend, seed=0, kind="qwen2")
    for step in range(LAST):
        train(strategy, model, optimizer, scheduler, range(step, step + 1))
        strategy.save_ckpt(model, folder, client_state={"step": step + 1}, max_num=2, asynchronous=True)
        if step == STEPS:
            announce("on the way")


def go_on(backend: str, folder: str) -> State:
    strategy, model, optimizer, scheduler = prepared(backend, seed=9, kind="qwen2")
    first = strategy.load_ckpt(model, folder).client_state["step"]
    assert 0 < first < LAST
    train(strategy, model, optimizer, scheduler, range(first, LAST))
    return state_of(strategy, model, optimizer)


def uninterrupted(backend: str) -> State:
    strategy, model, optimizer, scheduler = prepared(backend, seed=0, kind="qwen2")
    train(strategy, model, optimizer, scheduler, range(LAST))
    return state_of(strategy, model, optimizer)


def test_a_run_killed_under_zero_3_goes_on_under_fsdp2_on_one_rank(rank_pools: Any, tmp_path: Path) -> None:
    job = rank_pools(2).submit(train_and_save, "zero3", str(tmp_path))
    job.wait_for(0, "on the way")
    for rank in (0, 1):
        job.signal(rank, signal.SIGKILL)
    assert all(outcome.died == -signal.SIGKILL for outcome in job.outcomes(60, grace=1.0))
    (resumed,) = rank_pools(1).run(go_on, "fsdp", str(tmp_path))
    expected = rank_pools(2).run(uninterrupted, "zero3")[0]
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, atol=2e-5, rtol=1e-4, msg=name)
