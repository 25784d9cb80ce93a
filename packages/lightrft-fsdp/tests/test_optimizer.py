"""ShardedAdamW is torch's AdamW, with masters where parameters have 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightrft.fsdp import ShardedAdamW
from lightrft.fsdp.optimizer import supported_options

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(mine: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in mine:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_in_fp32_it_equals_torchs_bit_for_bit() -> None:
    mine, theirs = parameters(), parameters()
    ours, reference = ShardedAdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    for step in range(5):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        if step == 2:  # a parameter without a gradient is left alone, and its step does not count
            mine[1].grad = theirs[1].grad = None
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert ours.state[a]["step"] == reference.state[b]["step"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_masters_it_equals_fp32_adamw_on_them(dtype: torch.dtype) -> None:
    mine = parameters(dtype)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in mine]
    ours = ShardedAdamW(mine, **OPTIONS, master_weights=True)
    reference = torch.optim.AdamW(masters, fused=True, **OPTIONS)
    for step in range(20):
        give_gradients(mine, step)
        for master, parameter in zip(masters, mine, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        ours.step()
        reference.step()
    for parameter, master in zip(mine, masters, strict=True):
        state = ours.state[parameter]
        assert torch.equal(state["master"], master)
        assert torch.equal(state["exp_avg"], reference.state[master]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], reference.state[master]["exp_avg_sq"])
        assert torch.equal(parameter, master.to(dtype)), "the parameter is the master, rounded"
        assert {state[kind].dtype for kind in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}


def test_small_updates_add_up_in_the_masters() -> None:
    """At a small learning rate bf16 parameters alone never move: that is what masters are for."""
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    with_masters = ShardedAdamW([parameter], lr=1e-5, weight_decay=0.0, master_weights=True)
    lone = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    without = ShardedAdamW([lone], lr=1e-5, weight_decay=0.0)
    for _ in range(500):
        parameter.grad = torch.ones_like(parameter)
        lone.grad = torch.ones_like(lone)
        with_masters.step()
        without.step()
    assert torch.equal(lone, torch.ones_like(lone))
    assert torch.all(parameter < 1)


def test_fp32_gradients_of_16_bit_parameters_are_taken_as_they_are() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    parameter.grad_dtype = None  # type: ignore[attr-defined]
    optimizer = ShardedAdamW([parameter], lr=0.1, master_weights=True)
    fine = torch.full((4,), 1 + 2**-12)
    parameter.grad = fine
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.zeros(4).lerp(fine, 1 - 0.9))


def test_masters_follow_when_somebody_else_writes_the_parameters() -> None:
    (parameter,) = parameters(torch.bfloat16)[:1]
    optimizer = ShardedAdamW([parameter], lr=0.0, master_weights=True)
    give_gradients([parameter], 0)
    optimizer.step()
    with torch.no_grad():
        parameter.fill_(3.0)
    optimizer.renew_masters()
    give_gradients([parameter], 1)
    optimizer.step()
    assert torch.all(parameter == 3.0)


def test_a_rank_without_rows_counts_its_steps() -> None:
    parameter = nn.Parameter(torch.empty(0, 3))
    optimizer = ShardedAdamW([parameter], lr=0.1)
    parameter.grad = torch.empty(0, 3)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


def test_the_choice_of_a_kernel_is_its_own_and_what_it_lacks_is_refused() -> None:
    given = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": False, "foreach": True}
    ShardedAdamW(parameters(), **supported_options(given))
    with pytest.raises(TypeError, match=r"not amsgrad, learning_rate; make another optimizer first"):
        supported_options({**given, "amsgrad": True, "learning_rate": 1.0})


def test_an_lr_scheduler_takes_it() -> None:
    mine = parameters()
    optimizer = ShardedAdamW(mine, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    give_gradients(mine, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.75


@pytest.mark.parametrize(("on_host", "home"), [(True, "cpu"), (False, "meta")])
def test_states_begin_on_the_host_or_beside_their_parameter(on_host: bool, home: str) -> None:
    """`meta` is the one other device that every machine has."""
    parameter = nn.Parameter(torch.empty(3, 4, device="meta"))
    state = ShardedAdamW([parameter], on_host=on_host).state_of(parameter)
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "step"), home
    )


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(TypeError, match="amsgrad"):
        ShardedAdamW(parameters(), amsgrad=True)  # type: ignore[call-arg]
