from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.strategy.engine import EngineCapabilities, EngineSpec
from lightrft.strategy.fake_strategy import FakeStrategy
from lightrft.strategy.prompts import from_multi_modal_inputs, make_prompts, make_requests
from lightrft.strategy.registry import register_engine
from lightrft.strategy.sampling import SamplingParams, sample_seed
from lightrft.testing import FakeEngine


def images_of(prompts: Any) -> list[tuple[Any, ...]]:
    return [prompt.images for prompt in prompts]


def test_ids_and_texts_become_prompts_in_their_order() -> None:
    assert [p.prompt_token_ids for p in make_prompts([[1, 2], (3,)], None, None, None)] == [(1, 2), (3,)]
    assert [p.prompt for p in make_prompts(None, ["a", "b"], None, None)] == ["a", "b"]
    assert make_prompts([], None, None, None) == []


@pytest.mark.parametrize(("ids", "texts", "word"), [(None, None, "neither"), ([[1]], ["a"], "both")])
def test_ids_or_texts_one_of_the_two(ids: Any, texts: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make_prompts(ids, texts, None, None)


def test_what_is_no_prompt_is_named() -> None:
    one: Any = [7, 8]
    with pytest.raises(ValueError, match="has 7 in place of a prompt; give a list of prompts"):
        make_prompts(one, None, None, None)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        make_prompts([[1], []], None, None, None)


def test_images_come_one_list_a_prompt_or_flat_with_counts() -> None:
    texts = ["a", "b", "c"]
    x, y, z = "x.png", "y.png", "z.png"
    expected = [(x,), (), (y, z)]
    assert images_of(make_prompts(None, texts, [x, None, [y, z]], None)) == expected
    assert images_of(make_prompts(None, texts, [x, y, z], [1, 0, 2])) == expected
    assert images_of(make_prompts(None, texts, [[x], [], (y, z)], [1, 0, 2])) == expected
    assert images_of(make_prompts(None, texts, None, None)) == [()] * 3


@pytest.mark.parametrize(
    ("images", "counts", "words"),
    [
        (["x"], [1, 1], "together 2 for 1"),
        (["x", "y"], [2], "1 for 2 prompts"),
        (["x"], None, "1 entries for 2"),
        ([["x"], []], [0, 1], "differs"),
    ],
)
def test_images_that_do_not_add_up_are_refused(images: Any, counts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_prompts(None, ["a", "b"], images, counts)


@given(st.lists(st.integers(0, 3), max_size=6))
def test_a_flat_list_is_cut_by_its_counts(counts: list[int]) -> None:
    flat = [f"image{index}" for index in range(sum(counts))]
    pictures = images_of(make_prompts(None, ["p"] * len(counts), flat, counts))
    assert [len(part) for part in pictures] == counts
    assert [image for part in pictures for image in part] == flat


def test_every_sample_is_a_request_with_the_seed_of_its_place() -> None:
    prompts = make_prompts([[1], [2]], None, None, None)
    prompts = [type(p)(prompt_token_ids=p.prompt_token_ids, index=7 + i) for i, p in enumerate(prompts)]
    requests = make_requests(prompts, SamplingParams(n=2, temperature=0.5), run_seed=42, step=3)
    assert [r.prompt_token_ids for r in requests] == [(1,), (1,), (2,), (2,)]
    assert [r.sampling.seed for r in requests] == [sample_seed(42, 3, i, s) for i in (7, 8) for s in (0, 1)]
    assert all(r.sampling.n == 1 and r.sampling.temperature == 0.5 for r in requests)


def test_the_callers_seed_takes_the_runs_place() -> None:
    [request] = make_requests(make_prompts([[1]], None, None, None), SamplingParams(seed=9), run_seed=42, step=0)
    assert request.sampling.seed == sample_seed(9, 0, 0, 0)


def test_vllm_style_inputs_are_read_and_unknown_keys_refused() -> None:
    inputs = [{"prompt": "a", "multi_modal_data": {"image": ["x"]}}, {"prompt": "b"}]
    assert from_multi_modal_inputs(inputs) == (["a", "b"], [["x"], None])
    with pytest.raises(ValueError, match="video"):
        from_multi_modal_inputs([{"prompt": "a", "multi_modal_data": {"video": []}}])
    with pytest.raises(ValueError, match="multimodal input 0"):
        from_multi_modal_inputs([{"text": "a"}])


class Told(FakeEngine):
    """Keeps how many images it was told to allow."""

    capabilities: ClassVar[EngineCapabilities] = EngineCapabilities(
        devices=("cpu",), needs_model=False, multimodal=True
    )

    def start(self, spec: EngineSpec, group: Any = None) -> None:
        self.max_images = spec.max_images
        super().start(spec, group)


@pytest.mark.parametrize(("limit", "told"), [(-1, None), (1, 1), (2, 2)])
def test_a_prompt_with_more_images_than_the_limit_is_refused(limit: int, told: int | None) -> None:
    register_engine("told", Told)
    strategy = FakeStrategy(limit_mm_image_per_prompt=limit)
    strategy.setup_inference_engine(None, engine_type="told")
    assert isinstance(strategy.engine_host.engine, Told)
    assert strategy.engine_host.engine.max_images == told
    prompts: dict[str, Any] = {"all_prompts": ["a", "b"], "all_images": ["x", "y", "z"], "images_num": [1, 2]}
    if limit == 1:
        with pytest.raises(ValueError, match="a prompt has 2 images, --limit_mm_image_per_prompt is 1"):
            strategy.gather_and_generate({"max_tokens": 1}, **prompts)
    else:
        assert len(strategy.gather_and_generate({"max_tokens": 1}, **prompts)) == 2
