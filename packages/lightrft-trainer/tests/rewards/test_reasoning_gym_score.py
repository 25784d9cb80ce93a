from __future__ import annotations

import pytest

from lightrft.data.reasoning_gym import import_reasoning_gym
from lightrft.rewards import RewardError, reasoning_gym_score


def test_each_dataset_judges_its_own_answers():
    entries = [
        import_reasoning_gym().create_dataset(name, size=1, seed=1)[0] for name in ("chain_sum", "spell_backward")
    ]
    right = [entry["answer"] for entry in entries]
    prompts = [entry["question"] for entry in entries]
    assert reasoning_gym_score(prompts, right, entries) == [1.0, 1.0]
    assert reasoning_gym_score(prompts, [f"<think>hm</think><answer>{r}</answer>" for r in right], entries) == [
        1.0,
        1.0,
    ]
    assert all(score < 1.0 for score in reasoning_gym_score(prompts, ["wrong", "wrong"], entries))


def test_a_label_that_is_no_entry_is_named():
    with pytest.raises(RewardError, match=r"sample 0 .*not a reasoning-gym entry.*--prompt_data reasoning_gym:NAME"):
        reasoning_gym_score(["q"], ["4"], ["4"])
