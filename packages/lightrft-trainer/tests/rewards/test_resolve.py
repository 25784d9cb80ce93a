from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightrft.rewards import RewardError, build_reward, exact_match, parse_reward_spec, resolve_reward

MODULE = """
import json
def brevity(prompts, responses, labels, **extras):
    return [-float(len(response)) for response in responses]
def one_argument(response):
    return 1.0
NUMBER = 3
class Judge:
    @staticmethod
    def grade(prompts, responses, labels):
        return [0.5] * len(responses)
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's reward module, as the current one."""
    (tmp_path / "my_own_rewards.py").write_text(MODULE)
    (tmp_path / "needs_missing.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('on import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_own_rewards", "needs_missing", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_rules_have_names():
    assert resolve_reward("exact_match") is exact_match


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(RewardError, match=r"Did you mean exact_match\? Known are exact_match, format.*module:function"):
        resolve_reward("exactmatch")


def test_a_function_of_a_module_in_the_current_folder_is_found(user_folder: Path):
    assert resolve_reward("my_own_rewards:brevity")(["p"], ["abc"], [None]) == [-3.0]
    assert resolve_reward("my_own_rewards:Judge.grade")(["p"], ["abc"], [None]) == [0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "no module 'no_such_module_here'.*start from its folder"),
        ("needs_missing:f", "needs 'a_package_that_is_not_there', which is not installed"),
        ("broken_rewards:f", "importing broken_rewards raised RuntimeError: on import"),
        ("my_own_rewards:brevit", "has no 'brevit'; it has .*brevity"),
        ("my_own_rewards:NUMBER", "not a function"),
        ("my_own_rewards:one_argument", "cannot be called with"),
        ("my_own_rewards.py:brevity", "names a file; write it as a module, for example my_own_rewards:brevity"),
        ("folder/my_own_rewards.py:brevity", "for example folder.my_own_rewards:brevity"),
    ],
)
def test_what_cannot_be_found_or_called_is_named(user_folder: Path, name: str, message: str):
    with pytest.raises(RewardError, match=message):
        resolve_reward(name)


def test_a_spec_lists_names_and_weights():
    assert parse_reward_spec("exact_match, format=0.1,my_mod:f=-2") == [
        ("exact_match", 1.0),
        ("format", 0.1),
        ("my_mod:f", -2.0),
    ]


@pytest.mark.parametrize("spec", ["exact_match,,format", "exact_match=much", "", "=1"])
def test_a_broken_spec_is_refused(spec: str):
    with pytest.raises(RewardError, match=r"--reward"):
        parse_reward_spec(spec)


def test_a_whole_reward_is_built_from_one_line(user_folder: Path):
    reward = build_reward("exact_match,my_own_rewards:brevity=0.5")
    output = reward(["p", "q"], ["ab", "c"], ["ab", "d"])
    assert output.rewards == [1.0 - 1.0, 0.0 - 0.5]
    assert set(output.metrics) == {"exact_match", "my_own_rewards:brevity"}


def test_no_reward_at_all_says_what_there_is():
    with pytest.raises(RewardError, match=r"exact_match.*--remote_rm_url"):
        build_reward(None)


def test_a_weight_of_zero_is_refused():
    with pytest.raises(RewardError, match=r"exact_match=0"):
        build_reward("exact_match=0")
