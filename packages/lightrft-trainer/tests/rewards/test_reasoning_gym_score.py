from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from lightrft.rewards import RewardError, reasoning_gym_score


@pytest.fixture
def reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The real reasoning_gym, importable without pycosat, a C extension for zebra puzzles that has no wheel."""
    if importlib.util.find_spec("pycosat") is None:
        monkeypatch.setitem(sys.modules, "pycosat", ModuleType("pycosat"))
    return pytest.importorskip("reasoning_gym", reason="pip install 'lightrft-trainer[reasoning-gym]'")


def test_each_dataset_judges_its_own_answers(reasoning_gym: ModuleType):
    entries = [reasoning_gym.create_dataset(name, size=1, seed=1)[0] for name in ("chain_sum", "spell_backward")]
    right = [entry["answer"] for entry in entries]
    prompts = [entry["question"] for entry in entries]
    assert reasoning_gym_score(prompts, right, entries) == [1.0, 1.0]
    assert reasoning_gym_score(prompts, [f"<think>hm</think><answer>{r}</answer>" for r in right], entries) == [
        1.0,
        1.0,
    ]
    assert all(score < 1.0 for score in reasoning_gym_score(prompts, ["wrong", "wrong"], entries))


def test_a_label_that_is_no_entry_is_named(reasoning_gym: ModuleType):
    with pytest.raises(RewardError, match=r"sample 0 .*no reasoning-gym entry.*--prompt_data reasoning_gym:NAME"):
        reasoning_gym_score(["q"], ["4"], ["4"])
