from __future__ import annotations

import json
import statistics

import pytest
import torch

from lightrft.trainer.reward_shaping import RewardShaping, RunningMoments


def test_overlong_penalty_grows_linearly_to_its_factor() -> None:
    shaping = RewardShaping(overlong=True, overlong_buffer_len=40, overlong_penalty_factor=2.0, max_length=100)
    lengths = torch.tensor([0.0, 60, 80, 90, 100])
    assert shaping.apply(torch.zeros(5), lengths, RunningMoments()).tolist() == pytest.approx([0, 0, -1.0, -1.5, -2.0])


def test_running_moments_are_those_of_everything_seen() -> None:
    moments = RunningMoments()
    values = torch.randn(100, dtype=torch.float64) * 3 + 1
    for part in values.split([1, 9, 40, 50]):
        moments.update(part)
    assert moments.mean == pytest.approx(values.mean().item())
    assert moments.std == pytest.approx(values.std().item())


def test_running_moments_come_back_from_json_to_the_bit() -> None:
    moments, other = RunningMoments(), RunningMoments()
    moments.update(torch.rand(7))
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert vars(other) == vars(moments)


@pytest.mark.parametrize("minus_mean", [False, True])
def test_the_running_norm_divides_and_subtracts_the_mean_where_asked(minus_mean: bool) -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([6.0]))
    shaping = RewardShaping(running_norm=True, minus_mean=minus_mean)
    shaped = shaping.apply(torch.tensor([1.0, 3.0]), torch.ones(2), moments)
    shift, std = (10 / 3 if minus_mean else 0.0), statistics.stdev([6.0, 1.0, 3.0])
    assert shaped.tolist() == pytest.approx([(1.0 - shift) / std, (3.0 - shift) / std])


def test_constant_rewards_are_not_divided_by_zero() -> None:
    moments = RunningMoments()
    shaped = RewardShaping(running_norm=True, minus_mean=True).apply(torch.full((4,), 0.1), torch.ones(4), moments)
    assert torch.isfinite(shaped).all()
    assert shaped.abs().max() < 1e-6


def test_shaping_clips_last() -> None:
    shaping = RewardShaping(clip=0.5, overlong=True, overlong_buffer_len=10, overlong_penalty_factor=1.0, max_length=20)
    shaped = shaping.apply(torch.tensor([1.0, 0.2, 0.0]), torch.tensor([5, 15, 20]), RunningMoments())
    assert shaped.tolist() == pytest.approx([0.5, -0.3, -0.5])


def test_without_shaping_rewards_stay() -> None:
    rewards = torch.tensor([0.25, -7.0])
    assert RewardShaping().apply(rewards, torch.ones(2), RunningMoments()).tolist() == rewards.tolist()
