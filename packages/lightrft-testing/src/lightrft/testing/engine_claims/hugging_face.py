"""The common part of claims of equality with Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from lightrft.strategy.engine import GenerationOutput, RolloutEngine
from lightrft.strategy.sampling import SamplingParams

from ..tiny_models import TEXT_KINDS, VISION_KINDS
from .claims import EngineClaims
from .parts import GREEDY, PROMPTS, greedy_reference, hub_state, processed_logprobs, requests_for, tokens_of


class HuggingFaceClaims(EngineClaims):
    """The tiny models that an engine supports, and comparisons with them in fp32."""

    text_kinds: ClassVar[Sequence[str]] = TEXT_KINDS
    vision_kinds: ClassVar[Sequence[str]] = VISION_KINDS
    samples: ClassVar[int] = 3000
    logprob_tolerance: ClassVar[float] = 1e-5

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Tests that take ``kind`` run once for each text model, those with ``vision_kind`` for each other one.

        The scope lets pytest run all tests of one model before those of the next, which share its engine.
        """
        if "vision_kind" in metafunc.fixturenames:
            metafunc.parametrize("vision_kind", self.vision_kinds, scope="class")
        elif "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", self.text_kinds, scope="class")

    def _check_weights(self, engine: RolloutEngine, model: Any) -> None:
        """Every element of this rank's part of the engine."""
        if not engine.capabilities.readback:
            return
        state = hub_state(model)
        mine = engine.local_positions({name: torch.arange(tensor.numel()) for name, tensor in state.items()})
        assert any(len(positions) for positions in mine.values())
        for name, held in engine.sample_weights(mine).items():
            assert torch.equal(held, state[name].reshape(-1)[mine[name]]), name

    def _check_greedy(self, engine: RolloutEngine, model: Any) -> list[GenerationOutput]:
        outputs = engine.generate(requests_for(PROMPTS, GREEDY))
        assert tokens_of(outputs) == [greedy_reference(model, prompt, 12) for prompt in PROMPTS]
        return outputs

    def _check_logprobs(
        self, model: Any, output: GenerationOutput, sampling: SamplingParams, barred: Sequence[int] = ()
    ) -> None:
        expected = processed_logprobs(model, output, sampling, barred=barred)
        assert output.logprobs is not None
        for row, token, logprob in zip(expected, output.output_token_ids, output.logprobs, strict=True):
            assert abs(float(row[token]) - logprob) <= self.logprob_tolerance
