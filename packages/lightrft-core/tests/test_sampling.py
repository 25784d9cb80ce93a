from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.strategy.sampling import SamplingParams, sample_seed


def test_vllms_names_are_understood() -> None:
    params = SamplingParams.coerce(
        {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 9, "stop_token_ids": [1, 2]}
    )
    assert params == SamplingParams(
        n=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, max_tokens=9, stop_token_ids=(1, 2)
    )


def test_sglangs_and_transformers_names_are_understood() -> None:
    params = SamplingParams.coerce({"max_new_tokens": 9, "min_new_tokens": 2, "sampling_seed": 3})
    assert (params.max_tokens, params.min_tokens, params.seed) == (9, 2, 3)


def test_an_engines_own_object_is_read_by_attribute() -> None:
    vllm = SimpleNamespace(
        n=1, temperature=0.0, max_tokens=4, seed=None, stop_token_ids=None, logprobs=0, other="kept out"
    )
    params = SamplingParams.coerce(vllm)
    assert params.greedy
    assert params.max_tokens == 4
    assert params.stop_token_ids == ()
    assert params.logprobs, "vLLM's 0 asks for the sampled token's"


class Foreign:
    """An engine's own object, with settings that we have no name for."""

    def __init__(self, **given: Any) -> None:
        self.temperature, self.stop, self.logit_bias, self.skip_special_tokens = 1.0, [], None, True
        self._derived = object()
        self.__dict__.update(given)


@dataclasses.dataclass
class WithoutDefaults:
    temperature: float


def test_what_an_engines_own_object_sets_and_we_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Foreign sets stop=\['x'\], logit_bias=\{3: 1\.0\}, which would be lost"):
        SamplingParams.coerce(Foreign(temperature=0.5, stop=["x"], logit_bias={3: 1.0}))
    untouched = Foreign(temperature=0.5, stop=[], skip_special_tokens=False)
    for carried in (untouched, WithoutDefaults(0.5)):
        assert SamplingParams.coerce(carried) == SamplingParams(temperature=0.5)
    ends = Foreign(stop_token_ids=[7], eos_token_id=2)
    assert SamplingParams.coerce(ends).stop_token_ids == (7, 2)


def test_a_models_own_generation_config_is_read() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    of_a_model = {"bos_token_id": 1, "pad_token_id": 0, "use_cache": True, "max_new_tokens": 5}
    ends = transformers.GenerationConfig(**of_a_model, do_sample=False, eos_token_id=[2, 7])
    assert SamplingParams.coerce(ends) == SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=(2, 7))
    drawn = transformers.GenerationConfig(**of_a_model, do_sample=True, temperature=0.5, eos_token_id=2)
    assert SamplingParams.coerce(drawn) == SamplingParams(temperature=0.5, max_tokens=5, stop_token_ids=(2,))
    with pytest.raises(ValueError, match="GenerationConfig sets num_beams=4, which would be lost"):
        SamplingParams.coerce(transformers.GenerationConfig(num_beams=4))


def test_a_dict_may_name_what_an_engines_own_object_may() -> None:
    about_outputs = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert SamplingParams.coerce({"max_tokens": 3, **about_outputs}) == SamplingParams(max_tokens=3)
    assert SamplingParams.coerce(about_outputs) == SamplingParams()
    greedy = SamplingParams.coerce({"do_sample": False, "eos_token_id": 2, "stop_token_ids": [7]})
    assert greedy == SamplingParams(temperature=0.0, stop_token_ids=(7, 2))


def test_ours_and_nothing_pass_through() -> None:
    mine = SamplingParams(n=3)
    assert SamplingParams.coerce(mine) is mine
    assert SamplingParams.coerce(None) == SamplingParams()


def test_a_typo_does_not_silently_change_what_is_sampled() -> None:
    with pytest.raises(ValueError, match=r"unknown max_token, tempurature; known are .*max_tokens"):
        SamplingParams.coerce({"max_token": 3, "tempurature": 1.0})


@pytest.mark.parametrize("value", [5, object(), "text"])
def test_what_holds_no_parameter_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="has none of"):
        SamplingParams.coerce(value)


@pytest.mark.parametrize("logprobs", [(False, False), (True, True), (None, True), (0, True), (5, True)])
def test_only_false_turns_logprobs_off(logprobs: tuple[Any, bool]) -> None:
    assert SamplingParams.coerce({"logprobs": logprobs[0]}).logprobs is logprobs[1]


WRONG: dict[str, list[Any]] = {
    "n": [0, -1],
    "temperature": [-0.1],
    "top_p": [0.0, 1.1],
    "top_k": [-2],
    "min_p": [-0.1, 1.1],
    "max_tokens": [0],
    "min_tokens": [-1, 99],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value}: must be"):
        SamplingParams(**{name: value})


def test_all_values_out_of_range_are_named_at_once() -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(n=0, temperature=-1, top_p=2)
    assert all(name in str(error.value) for name in ("n = 0", "temperature = -1", "top_p = 2"))


@given(
    st.booleans(),
    st.floats(0.01, 1),
    st.integers(-1, 5),
    st.floats(0, 1),
)
def test_full_support_means_that_only_the_temperature_shapes(
    greedy: bool, top_p: float, top_k: int, min_p: float
) -> None:
    params = SamplingParams(temperature=0.0 if greedy else 0.5, top_p=top_p, top_k=top_k, min_p=min_p)
    assert params.full_support == (top_p == 1 and top_k in (-1, 0) and min_p == 0)
    assert params.greedy == greedy


# ---- seeds -----------------------------------------------------------------------------------------------------------
PLACE = st.tuples(st.integers(0, 2**31), st.integers(0, 10_000), st.integers(0, 100_000), st.integers(0, 512))


@given(PLACE)
def test_a_seed_is_a_function_of_its_place_and_fits_every_engine(place: tuple[int, int, int, int]) -> None:
    assert sample_seed(*place) == sample_seed(*place)
    assert 0 <= sample_seed(*place) < 2**63


@given(PLACE, PLACE)
def test_two_places_have_two_seeds(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    assert (sample_seed(*a) == sample_seed(*b)) == (a == b)


def test_seeds_of_neighbours_do_not_follow_each_other() -> None:
    seeds = [sample_seed(42, 0, prompt, sample) for prompt in range(64) for sample in range(16)]
    assert len(set(seeds)) == 1024
    differences = [b - a for a, b in itertools.pairwise(seeds)]
    assert len(set(differences)) == len(differences)
    high = sum(seed >= 2**62 for seed in seeds)
    assert 400 < high < 624, "spread over the whole range"


def test_a_seed_never_changes_between_releases() -> None:
    """Resumed runs and other people's logs rely on these."""
    assert sample_seed(42, 0, 0, 0) == 7134082022248438586
    assert sample_seed(1, 2, 3, 4) == 2429351365415745036
