"""Claims about text: greedy answers, logprobs and distributions are those of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lightrft.strategy.engine import RolloutEngine
from lightrft.strategy.sampling import SamplingParams

from ..tiny_models import EOS
from .claims import SharedEngines
from .hugging_face import HuggingFaceClaims
from .parts import GREEDY, PROMPTS, processed_logprobs, requests_for, shared_model


class TextClaims(HuggingFaceClaims):
    """Tokens and their probabilities."""

    def test_greedy_equals_hugging_face(self, engines: SharedEngines, folders: Any, kind: str) -> None:
        self._check_greedy(engines.fresh(folders(kind)), shared_model(kind))

    def test_sampled_logprobs_equal_a_teacher_forced_forward(
        self, engines: SharedEngines, folders: Any, kind: str
    ) -> None:
        engine, model = engines.fresh(folders(kind)), shared_model(kind)
        for temperature in (1.0, 0.7):
            sampling = SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True)
            for output in engine.generate(requests_for(PROMPTS, sampling)):
                self._check_logprobs(model, output, sampling)

    @pytest.mark.parametrize(
        "truncation",
        [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.01}],
        ids=["top_k", "top_p", "min_p", "all"],
    )
    def test_truncated_logprobs_are_renormalised(self, engine: RolloutEngine, truncation: Mapping[str, Any]) -> None:
        model = shared_model("qwen2")
        sampling = SamplingParams(temperature=1.3, max_tokens=12, ignore_eos=True, **truncation)
        for output in engine.generate(requests_for(PROMPTS, sampling)):
            self._check_logprobs(model, output, sampling)

    def test_min_tokens_keep_the_end_token_out_of_the_distribution(self, engine: RolloutEngine) -> None:
        model = shared_model("qwen2")
        sampling = SamplingParams(temperature=2.0, max_tokens=8, min_tokens=8)
        for output in engine.generate(requests_for(PROMPTS * 8, sampling)):
            assert len(output.output_token_ids) == 8
            self._check_logprobs(model, output, sampling, barred=(EOS,))

    def test_greedy_logprobs_are_the_models_own(self, engine: RolloutEngine) -> None:
        model = shared_model("qwen2")
        for output in engine.generate(requests_for(PROMPTS, GREEDY)):
            self._check_logprobs(model, output, GREEDY)

    def test_the_models_end_token_stops_unless_ignored(self, engines: SharedEngines, folders: Any) -> None:
        engine, model = engines.fresh(folders("qwen2")), shared_model("qwen2")
        sampling = SamplingParams(temperature=2.0, max_tokens=60)
        outputs = engine.generate(requests_for(PROMPTS * 20, sampling))
        stopped = [o for o in outputs if o.finish_reason == "stop"]
        assert stopped, "in 100 samples of 60 tokens at this temperature some must end"
        assert all(o.output_token_ids.index(EOS) == len(o.output_token_ids) - 1 for o in stopped)
        assert all(EOS not in o.output_token_ids for o in outputs if o.finish_reason == "length")
        self._check_logprobs(model, stopped[0], sampling)

    @pytest.mark.parametrize(
        "truncation",
        [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}],
        ids=["plain", "temperature", "top_k", "top_p", "min_p"],
    )
    def test_samples_follow_the_distribution(self, engine: RolloutEngine, truncation: Mapping[str, Any]) -> None:
        """Chi-square over the first token of many samples; new seeds would fail by chance once in about a million."""
        model, count = shared_model("qwen2"), self.samples
        sampling = SamplingParams(**{"temperature": 1.0, "max_tokens": 1, "ignore_eos": True, **truncation})
        outputs = engine.generate(requests_for([PROMPTS[0]] * count, sampling, [7919 * i + 5 for i in range(count)]))
        expected = processed_logprobs(model, outputs[0], sampling)[0].exp() * count
        seen = torch.bincount(torch.tensor([o.output_token_ids[0] for o in outputs]), minlength=len(expected)).double()
        assert not seen[expected == 0].any(), "a token outside the truncated distribution was drawn"
        statistic, freedom = _chi_square(seen, expected)
        assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 10


def _chi_square(seen: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells below 5 expected samples are pooled."""
    rare = expected < 5
    cells = [(seen[~rare], expected[~rare])]
    if rare.any() and float(expected[rare].sum()) > 0:
        cells.append((seen[rare].sum().reshape(1), expected[rare].sum().reshape(1)))
    observed, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return float(((observed - wanted) ** 2 / wanted).sum()), max(len(wanted) - 1, 1)
