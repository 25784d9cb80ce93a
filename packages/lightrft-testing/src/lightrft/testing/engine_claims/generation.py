"""Claims about requests and their outputs."""

from __future__ import annotations

import pytest
import torch

from lightrft.strategy.engine import GenerationRequest, RolloutEngine
from lightrft.strategy.sampling import SamplingParams

from .claims import EngineClaims, MakeEngine
from .parts import GREEDY, PROMPTS, requests_for, tokens_of


class GenerationClaims(EngineClaims):
    """Order, lengths, stops, seeds, deadlines."""

    def test_outputs_come_in_the_order_of_the_requests(self, engine: RolloutEngine) -> None:
        outputs = engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=5)))
        assert [tuple(o.prompt_token_ids) for o in outputs] == list(PROMPTS)
        assert all(1 <= len(o.output_token_ids) <= 5 for o in outputs)

    def test_every_token_has_a_logprob(self, engine: RolloutEngine) -> None:
        if not engine.capabilities.logprobs:
            pytest.skip(f"engine {engine.name} says that it returns no logprobs (capabilities.logprobs)")
        for output in engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=5))):
            assert output.logprobs is not None
            assert len(output.logprobs) == len(output.output_token_ids)
            assert all(value <= 1e-6 for value in output.logprobs)

    def test_logprobs_that_nobody_asked_for_are_none(self, engine: RolloutEngine) -> None:
        outputs = engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=3, logprobs=False)))
        assert [o.logprobs for o in outputs] == [None] * len(PROMPTS)

    def test_no_requests_give_no_outputs(self, engine: RolloutEngine) -> None:
        assert engine.generate([]) == []

    def test_poll_returns_what_was_submitted(self, engine: RolloutEngine) -> None:
        first = engine.submit(requests_for(PROMPTS[:2], GREEDY))
        second = engine.submit(requests_for(PROMPTS[2:], GREEDY))
        assert [o.request_id for o in engine.poll("all")] == [*first, *second]
        assert engine.poll("all") == []

    def test_aborted_requests_say_so(self, engine: RolloutEngine) -> None:
        ids = engine.submit(requests_for(PROMPTS, GREEDY))
        engine.abort(ids[:1])
        outputs = {o.request_id: o for o in engine.poll("all")}
        assert set(outputs) == set(ids)
        assert outputs[ids[0]].finish_reason in ("abort", "length")  # it may have been finished already
        assert all(outputs[i].finish_reason == "length" for i in ids[1:])

    def test_the_same_request_gives_the_same_sample(self, engine: RolloutEngine) -> None:
        self._needs_seeds(engine)
        requests = requests_for(PROMPTS, SamplingParams(max_tokens=8))
        assert tokens_of(engine.generate(requests)) == tokens_of(engine.generate(requests))

    def test_a_sample_does_not_depend_on_its_batch(self, engine: RolloutEngine) -> None:
        self._needs_seeds(engine)
        requests = requests_for(PROMPTS * 4, SamplingParams(max_tokens=8))
        together = tokens_of(engine.generate(requests))
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(3)).tolist()
        shuffled = tokens_of(engine.generate([requests[i] for i in order]))
        assert [shuffled[order.index(i)] for i in range(len(requests))] == together
        assert [tokens_of(engine.generate([request]))[0] for request in requests[:6]] == together[:6]

    def test_samples_of_one_prompt_differ_by_seed(self, engine: RolloutEngine) -> None:
        outputs = engine.generate(requests_for([PROMPTS[0]] * 16, SamplingParams(max_tokens=8, ignore_eos=True)))
        assert len({tuple(tokens) for tokens in tokens_of(outputs)}) > 8

    def test_max_tokens_ends_with_length(self, engine: RolloutEngine) -> None:
        for output in engine.generate(requests_for(PROMPTS, GREEDY)):
            assert (len(output.output_token_ids), output.finish_reason) == (12, "length")

    def test_each_request_has_its_own_length(self, engine: RolloutEngine) -> None:
        requests = [
            GenerationRequest(
                prompt_token_ids=prompt, sampling=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=3 + 4 * i)
            )
            for i, prompt in enumerate(PROMPTS)
        ]
        assert [len(tokens) for tokens in tokens_of(engine.generate(requests))] == [3, 7, 11, 15, 19]

    def test_a_stop_token_ends_the_response_and_is_its_last_token(self, engine: RolloutEngine) -> None:
        whole = tokens_of(engine.generate(requests_for(PROMPTS[:1], GREEDY)))[0]
        stop = whole[5]
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop, 511))
        output = engine.generate(requests_for(PROMPTS[:1], sampling))[0]
        assert output.output_token_ids == whole[: whole.index(stop) + 1]
        assert output.finish_reason == "stop"

    def test_stop_tokens_wait_for_min_tokens(self, engine: RolloutEngine) -> None:
        stops = tuple(dict.fromkeys(tokens_of(engine.generate(requests_for(PROMPTS[:1], GREEDY)))[0]))
        sampling = SamplingParams(
            temperature=0.0, max_tokens=12, min_tokens=9, ignore_eos=True, stop_token_ids=stops[:4]
        )
        output = engine.generate(requests_for(PROMPTS[:1], sampling))[0]
        assert len(output.output_token_ids) >= 9
        assert not set(output.output_token_ids[:9]) & set(stops[:4])

    def test_the_context_ends_a_response_with_length(self, make_engine: MakeEngine, model_folder: str) -> None:
        engine = make_engine(self.spec(model_folder, max_model_len=32))
        try:
            sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
            output = engine.generate(requests_for([PROMPTS[2]], sampling))[0]
            assert (len(output.output_token_ids), output.finish_reason) == (32 - len(PROMPTS[2]), "length")
            with pytest.raises(ValueError, match="context of 32"):
                engine.generate(requests_for([(5,) * 32], GREEDY))
            assert len(engine.generate(requests_for(PROMPTS[:1], GREEDY))) == 1
        finally:
            engine.shutdown()

    def test_random_state_of_the_process_is_left_alone(self, engine: RolloutEngine) -> None:
        before = torch.get_rng_state()
        engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=6)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_starting_leaves_the_random_state_alone(self, make_engine: MakeEngine, model_folder: str) -> None:
        before = torch.get_rng_state()
        engine = make_engine(self.spec(model_folder))
        try:
            assert torch.equal(torch.get_rng_state(), before)
        finally:
            engine.shutdown()

    def test_a_missed_deadline_is_a_timeout(self, engine: RolloutEngine) -> None:
        with pytest.raises(TimeoutError):
            engine.generate(requests_for(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True)), timeout=0.0)
        assert len(engine.generate(requests_for(PROMPTS[:1], GREEDY))) == 1

    def _needs_seeds(self, engine: RolloutEngine) -> None:
        if not engine.capabilities.seeds:
            pytest.skip(f"engine {engine.name} says that it honours no seeds here (capabilities.seeds)")
