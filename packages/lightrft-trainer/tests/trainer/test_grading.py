"""Reward models in the grading: as modules and served by an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lightrft.data.tasks import build_default_model, build_tokenizer
from lightrft.models import RewardModel
from lightrft.rewards import CheckedReward, CombinedReward, RewardError
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.registry import register_scoring_engine
from lightrft.strategy.scoring import ScoringEngine
from lightrft.testing.tiny_models import tiny_config
from lightrft.trainer.experience import Experience
from lightrft.trainer.grading import Grader
from lightrft.trainer.run import build_models


class PlainScoring(ScoringEngine):
    """transformers, one sequence at a time."""

    name: ClassVar[str] = "plain"

    def start(self, spec: Any, group: Any = None, *, cuda_graphs: bool = False) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(spec.pretrain).eval()

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        return [self.model(torch.tensor([list(tokens)])).logits.item() for tokens in sequences]

    def release(self) -> None: ...
    def restore(self) -> None: ...
    def shutdown(self) -> None: ...


@pytest.fixture
def folder(tmp_path: Any) -> str:
    """A tiny classifier with one output."""
    torch.manual_seed(0)
    config = tiny_config("qwen2")
    config.num_labels, config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    return str(tmp_path / "rm")


def graded(strategy: FakeStrategy, model: Any) -> list[float]:
    rows = [torch.arange(3, 3 + length) for length in (4, 9, 6)]
    samples = [Experience(i, i, row, response_length=2) for i, row in enumerate(rows)]
    prompts = [SimpleNamespace(prompt="", label=None, images=None)] * 3
    return Grader(strategy, build_tokenizer(), [], models=[model], micro_batch_size=2)(prompts, samples, 1, 0).rewards


def test_a_reward_model_scores_alike_as_a_module_and_in_an_engine(folder: str) -> None:
    register_scoring_engine("plain", PlainScoring)
    strategy = FakeStrategy()
    served = graded(strategy, strategy.setup_reward_engine(folder, "plain"))
    assert graded(strategy, strategy.prepare_model(RewardModel(folder))) == pytest.approx(served, abs=1e-6)
    assert len(set(served)) == 3


def test_a_reward_sees_of_each_sample_what_is_its_own() -> None:
    tokenizer, seen = build_tokenizer(), []

    def reward(prompts: Any, responses: Any, labels: Any, **extras: Any) -> list[float]:
        named = ("finish_reasons", "response_lengths", "images")
        seen.extend(zip(prompts, responses, labels, *(extras[name] for name in named), strict=True))
        return [float(len(text)) for text in responses]

    texts = ["1=1", "1=22", "2=333", "2=4444"]
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    samples = [Experience(i, i // 2, row, response_length=i + 1, finished=i < 3) for i, row in enumerate(rows)]
    prompts = [SimpleNamespace(prompt=text, label=text * 2, images=[text]) for text in ("1=", "2=")]
    grades = Grader(FakeStrategy(), tokenizer, [reward])(prompts, samples, 2, 0)
    assert seen == [
        ("1=", "1", "1=1=", "stop", 1, ["1="]),
        ("1=", "22", "1=1=", "stop", 2, ["1="]),
        ("2=", "333", "2=2=", "stop", 3, ["2="]),
        ("2=", "4444", "2=2=", "length", 4, ["2="]),
    ]
    assert grades.rewards == [1.0, 2.0, 3.0, 4.0]


def test_right_is_what_the_first_part_says_whatever_its_weight_and_the_others() -> None:
    right = CheckedReward(lambda prompts, responses, labels: [1.0, 0.0], name="right")
    form = CheckedReward(lambda prompts, responses, labels: [0.0, 1.0], name="form")
    samples = [Experience(i, i, torch.tensor([3, 4]), response_length=1) for i in range(2)]
    prompts = [SimpleNamespace(prompt="", label=None, images=None)] * 2
    for parts, rewards in (([(right, 0.5), (form, 2.0)], [0.5, 2.0]), ([(right, 0.5)], [0.5, 0.0])):
        grades = Grader(FakeStrategy(), build_tokenizer(), [CombinedReward(parts)])(prompts, samples, 1, 0)
        assert (grades.rewards, grades.right) == (rewards, [1.0, 0.0])


def test_a_score_that_is_no_number_names_its_sample(folder: str) -> None:
    model = RewardModel(folder)
    torch.nn.init.constant_(model.model.score.weight, math.nan)
    with pytest.raises(RewardError, match="sample 0 of this rank scored nan"):
        graded(FakeStrategy(), model)


def test_a_reward_model_that_an_engine_serves_is_not_loaded_beside_it(folder: str, tmp_path: Path) -> None:
    actor = str(build_default_model(tmp_path / "actor"))
    for served in (True, False):
        strategy = FakeStrategy(pretrain=actor, reward_pretrain=folder, rm_use_engine=served, init_kl_coef=0.0)
        reward_models = build_models(strategy, strategy.config, multimodal=False)[2]
        assert (reward_models is None) is served
