from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaForCausalLM as Llama

from lightrft.data.tasks import TaskExample, TaskSplit, build_model, build_tokenizer, reverse_digits
from lightrft.data.warm_start import build_warm_model, encode_solved, greedy_accuracy, warm_start

SHORT = reverse_digits(length=2, held_out=40, seed=0)


def train(seed: int = 0, **options: Any) -> tuple[Any, Any]:
    model = build_model(seed=seed)
    return model, warm_start(model, build_tokenizer(), SHORT, seed=seed, batch_size=32, **options)


def test_it_stops_inside_the_window_and_says_what_it_did():
    model, report = train(window=(0.2, 0.5))
    assert 0.2 <= report.accuracy <= 0.5
    assert report.steps > 0
    assert report.held_out == 40
    rows, prompt_length = encode_solved(build_tokenizer(), SHORT.held_out)
    assert greedy_accuracy(model, rows, prompt_length) == report.accuracy
    assert f"{report.steps} steps of 32 solved questions, held-out accuracy {report.accuracy:.3f}" in str(report)


def test_the_same_seed_gives_the_same_weights():
    (first, one), (second, two) = train(window=(0.2, 0.5)), train(window=(0.2, 0.5))
    assert (one.steps, one.accuracy) == (two.steps, two.accuracy)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_leap_over_the_window_is_taken_back_and_tried_in_smaller_steps():
    """What is measured is scripted: before the first step, after a leap, within the window."""
    untrained = build_model(seed=0).state_dict()
    with (
        mock.patch("lightrft.data.warm_start.greedy_accuracy", side_effect=[0.0, 0.9, 0.3]),
        mock.patch.object(AdamW, "load_state_dict", autospec=True, side_effect=AdamW.load_state_dict) as optimizers,
        mock.patch.object(Llama, "load_state_dict", autospec=True, side_effect=Llama.load_state_dict) as models,
    ):
        _, report = train(window=(0.25, 0.35), learning_rate=1e-3)
    assert report.accuracy == 0.3
    assert [call.args[0].param_groups[0]["lr"] for call in optimizers.call_args_list] == [5e-4]
    (restored,) = [call.args[1] for call in models.call_args_list]
    assert all(torch.equal(restored[name], value) for name, value in untrained.items())


def test_greedy_accuracy_is_that_of_decoding():
    model, _ = train(window=(0.2, 0.5))
    tokenizer = build_tokenizer()
    rows, prompt_length = encode_solved(tokenizer, SHORT.held_out)
    decoded = model.eval().generate(rows[:, :prompt_length], do_sample=False, max_new_tokens=3)
    answers = tokenizer.batch_decode(decoded[:, prompt_length:], skip_special_tokens=True)
    ended = [tokenizer.eos_token_id in row for row in decoded[:, prompt_length:].tolist()]
    right = [a == e.label and end for a, e, end in zip(answers, SHORT.held_out, ended, strict=True)]
    assert greedy_accuracy(model, rows, prompt_length) == pytest.approx(sum(right) / len(right))


def test_what_cannot_be_reached_is_an_error():
    with pytest.raises(RuntimeError, match=r"after 2 steps; 0\.9 was required"):
        train(window=(0.9, 1.0), max_steps=2)
    with pytest.raises(ValueError, match=r"0 <= low < high <= 1"):
        train(window=(0.5, 0.5))


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one length"):
        encode_solved(build_tokenizer(), [TaskExample("12=", "21"), TaskExample("123=", "321")])


def test_the_warm_model_is_a_folder_that_loads(tmp_path: Path):
    split = TaskSplit(train=SHORT.train, held_out=SHORT.held_out[:10])
    report = build_warm_model(tmp_path, seed=1, split=split)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    rows, prompt_length = encode_solved(tokenizer, split.held_out)
    assert greedy_accuracy(model, rows, prompt_length) == pytest.approx(report.accuracy)
