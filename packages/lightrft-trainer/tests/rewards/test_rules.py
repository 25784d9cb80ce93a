from __future__ import annotations

import time

import pytest

from lightrft.rewards import RewardError, exact_match, format_reward, resolve_reward

THINK_ANSWER = "<think>2 + 2</think> <answer>4</answer>"


def test_exact_match_ignores_surrounding_blanks_only():
    assert exact_match(["q"] * 4, ["12", " 12\n", "1 2", "12."], ["12"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_exact_match_accepts_any_of_several_labels():
    assert exact_match(["q", "q"], ["colour", "couleur"], [["color", "colour"]] * 2) == [1.0, 0.0]


def test_exact_match_takes_the_answer_of_a_reasoning_gym_entry():
    assert exact_match(["q"], ["-4"], [{"question": "q", "answer": "-4", "metadata": {}}]) == [1.0]


def test_a_missing_label_names_the_sample_and_the_flag():
    with pytest.raises(RewardError, match=r"sample 1 \(prompt 'second'\).*--label_key") as caught:
        exact_match(["first", "second"], ["a", "b"], ["a", None])
    assert caught.value.sample == 1


def test_the_format_reward_does_not_look_at_the_prompt():
    # The prompt itself shows the wanted form: that must not earn anything.
    assert resolve_reward("format")([f"Answer like {THINK_ANSWER}"], ["4"], [None]) == [0.0]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (THINK_ANSWER, 1.0),
        (f"\n{THINK_ANSWER}\n", 1.0),
        ("<think>over\nlines</think>\n<answer>4</answer>", 1.0),
        (f"Sure! {THINK_ANSWER}", 0.0),
        (f"{THINK_ANSWER} {THINK_ANSWER}", 0.0),
        ("<think>a<think>b</think></think><answer>4</answer>", 0.0),
        ("<answer>4</answer><think>2 + 2</think>", 0.0),
        ("<think>2 + 2</think>", 0.0),
        ("", 0.0),
    ],
)
def test_the_think_answer_format_is_wanted_once_and_alone(response: str, reward: float):
    assert resolve_reward("format")(["q"], [response], [None]) == [reward]


def test_a_format_of_ones_own_must_match_the_whole_response():
    digits = format_reward(r"\d+")
    assert digits(["q"] * 2, ["42", "42 apples"], [None] * 2) == [1.0, 0.0]


def test_the_boxed_format_may_stand_anywhere():
    assert resolve_reward("format_boxed")(
        ["q"] * 3, ["so\n\\boxed{4}.", "\\boxed{} or \\boxed{4}", "so 4"], [None] * 3
    ) == [1.0, 1.0, 0.0]


def test_a_mark_repeated_without_end_is_read_in_one_pass():
    begun = time.process_time()
    assert resolve_reward("format_boxed")(["q"], ["\\boxed{" * 20_000], [None]) == [0.0]
    assert time.process_time() - begun < 5.0


def test_a_broken_pattern_is_refused_when_it_is_written():
    with pytest.raises(ValueError, match=r"not a regular expression"):
        format_reward("(unclosed")
