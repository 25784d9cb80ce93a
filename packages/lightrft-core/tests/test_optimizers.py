from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightrft.strategy.optimizers import LossScale, decay_groups, move_optimizer, rebind


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1, bias=False))


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    model = net()
    decayed, spared = decay_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (1, 4)]
    assert all(p.ndim == 1 for p in spared["params"])


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = net()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    [group] = decay_groups(model.named_parameters(), 0.1)
    assert group["params"] == [model[2].weight]


def test_a_flat_shard_is_grouped_by_its_whole_shape() -> None:
    flat = nn.Parameter(torch.zeros(12))
    [group] = decay_groups([("w", flat)], 0.1, ndim=lambda parameter: 2)
    assert group["weight_decay"] == 0.1


def test_an_optimizer_is_rebound_in_place() -> None:
    model = net()
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    twin = copy.deepcopy(model)
    rebind(optimizer, names, dict(twin.named_parameters()))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in twin.parameters()}
    assert len(optimizer.param_groups) == 2


def test_an_optimizer_of_another_model_or_with_a_past_is_refused() -> None:
    model, other = net(), net()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="not the model's"):
        rebind(torch.optim.AdamW(other.parameters()), names, dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="already stepped"):
        rebind(optimizer, names, dict(model.named_parameters()))


def test_the_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(enabled=True, initial=8.0, interval=3)
    scale.update(finite=False)
    assert scale.value == 4.0
    for expected in (4.0, 4.0, 8.0, 8.0):
        scale.update(finite=True)
        assert scale.value == expected
    for _ in range(10):
        scale.update(finite=False)
    assert scale.value == 1.0, "it never vanishes"


def test_a_disabled_loss_scale_is_one() -> None:
    scale = LossScale(enabled=False)
    scale.update(finite=False)
    assert scale.value == 1.0


def test_the_loss_scale_comes_back_from_its_state() -> None:
    scale = LossScale(enabled=True, interval=3)
    scale.update(finite=True)
    other = LossScale(enabled=True, interval=3)
    other.load_state_dict(scale.state_dict())
    for one in (scale, other):
        one.update(finite=True)
        one.update(finite=True)
    assert other.value == scale.value == 2.0**17


def test_moving_an_optimizer_that_has_not_stepped_moves_nothing() -> None:
    optimizer = torch.optim.AdamW(net().parameters())
    assert move_optimizer(optimizer, torch.device("cpu"), pin=False) == 0
    assert move_optimizer(optimizer, torch.device("meta"), pin=False) == 0


def test_moving_counts_bytes_and_spares_the_step_counter() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    numel = sum(p.numel() for p in model.parameters())
    assert move_optimizer(optimizer, torch.device("meta"), pin=False) == 2 * 4 * numel
    for state in optimizer.state.values():
        assert state["exp_avg"].is_meta
        assert not state["step"].is_meta
