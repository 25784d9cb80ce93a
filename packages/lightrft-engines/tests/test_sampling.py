from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.engines.sampling import (
    RowSampling,
    SamplingShape,
    draw,
    exponential_noise,
    noise_ahead,
    noise_keys,
    noise_stream,
    splitmix64,
    tokens_ahead,
    truncate,
)

IDS = torch.arange(4096, dtype=torch.int32)


def rows(
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: torch.Tensor | None = None,
) -> RowSampling:
    return RowSampling(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        stream=noise_stream(torch.arange(count) if seeds is None else seeds),
    )


def uniforms(seeds: torch.Tensor, index: torch.Tensor, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The uniforms behind the noise, float64."""
    return (-exponential_noise(noise_keys(noise_stream(seeds), index), ids).double()).exp()


def test_splitmix64_is_the_published_generator() -> None:
    golden, state, values = -7046029254386353131, 1234567, []
    for _ in range(3):  # the reference's first outputs for seed 1234567
        state = (state + golden + 2**63) % 2**64 - 2**63
        values.append(int(splitmix64(torch.tensor([state]))[0]) % 2**64)
    assert values == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_finite_and_reaches_far_into_the_tail() -> None:
    keys = noise_keys(noise_stream(torch.arange(1000)), torch.zeros(1000, dtype=torch.int64))
    noise = exponential_noise(keys, IDS)
    assert torch.isfinite(noise).all()
    assert 0 < noise.min() < 2e-6  # the least of four million is about 2.5e-7
    assert noise.max() < 20


@pytest.mark.parametrize("axis", ["ids", "seeds", "positions"])
def test_noise_is_uniform_and_uncorrelated_along(axis: str) -> None:
    """Kolmogorov-Smirnov against the uniform, and correlations at small lags, on 400,000 values each."""
    steps = torch.arange(100)
    if axis == "ids":
        u = uniforms(steps, steps)
    elif axis == "seeds":
        u = uniforms(torch.arange(4096), torch.full((4096,), 3), IDS[:100]).T
    else:
        u = uniforms(torch.full((4096,), 3), torch.arange(4096), IDS[:100]).T
    flat = u.reshape(-1).sort().values
    n = flat.numel()
    distance = (flat - torch.arange(1, n + 1, dtype=torch.float64) / n).abs().max() + 1 / n
    assert distance * math.sqrt(n) < 2.2  # exceeded once in 8000
    centred = u - 0.5
    for lag in (1, 2, 3, 16, 64):
        correlation = float((centred[:, lag:] * centred[:, :-lag]).mean() * 12)
        assert abs(correlation) * math.sqrt(n) < 5
    between_rows = float((centred[1:] * centred[:-1]).mean() * 12)
    assert abs(between_rows) * math.sqrt(n) < 5


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), index=st.integers(0, 100_000), flip=st.integers(0, 62))
def test_noise_changes_wholly_with_one_bit_of_the_seed_or_one_step(seed: int, index: int, flip: int) -> None:
    seeds = torch.tensor([seed, seed ^ (1 << flip), seed])
    noise = exponential_noise(noise_keys(noise_stream(seeds), torch.tensor([index, index, index + 1])), IDS)
    assert (noise[0] == noise[1]).float().mean() < 0.01
    assert (noise[0] == noise[2]).float().mean() < 0.01


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), index=st.integers(0, 100_000), data=st.data())
def test_noise_of_some_ids_is_that_of_all_ids(seed: int, index: int, data: st.DataObject) -> None:
    some = torch.tensor(data.draw(st.lists(st.integers(0, 4095), min_size=1, max_size=20)), dtype=torch.int32)
    keys = noise_keys(noise_stream(torch.tensor([seed])), torch.tensor([index]))
    assert torch.equal(exponential_noise(keys, some.unsqueeze(0)), exponential_noise(keys, IDS)[:, some.long()])


def test_noise_made_for_several_tokens_is_that_of_each() -> None:
    stream, index = noise_stream(torch.arange(3)), torch.tensor([0, 7, 100])
    ahead = noise_ahead(stream, index, len(IDS), 5)
    for token in range(5):
        assert torch.equal(ahead[:, token], exponential_noise(noise_keys(stream, index + token), IDS))


def test_noise_is_made_ahead_where_vocabularies_are_small_and_for_no_token_too_many() -> None:
    assert tokens_ahead(64, 512, 100) == 4
    assert tokens_ahead(64, 512, 3) == 3
    assert tokens_ahead(16, 49152, 100) == 1


def reference(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The kept tokens of one row, ties aside, written as the definitions read."""
    p = logits.double().softmax(-1)
    kept = p >= min_p * p.max()
    if top_k:
        kept &= p >= p.masked_fill(~kept, 0).sort(descending=True).values[: max(top_k, 1)][-1]
    q = p.masked_fill(~kept, 0)
    q = q / q.sum()
    ranked = q.argsort(descending=True)
    before = q[ranked].cumsum(0) - q[ranked]
    return kept & torch.zeros_like(kept).scatter(0, ranked, before < top_p)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([5, 300, 3000]),
    top_k=st.sampled_from([0, 1, 7, 50, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    spread=st.sampled_from([0.3, 3.0]),  # of which the smaller spreads the probability over most of the vocabulary
)
def test_truncation_keeps_what_the_definitions_keep(
    seed: int, vocabulary: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    shape = SamplingShape(min_p=min_p > 0, top_p=top_p < 1, max_top_k=top_k)
    values, ids = truncate(logits.clone(), rows(4, top_k=top_k, top_p=top_p, min_p=min_p), shape)
    for row in range(4):
        kept = torch.isfinite(values[row])
        found = kept if ids is None else torch.zeros(vocabulary, dtype=torch.bool).scatter(0, ids[row], kept)
        wanted = reference(logits[row], top_k, top_p, min_p)
        if not torch.equal(found, wanted):  # rounding may move a token whose share stands on the border of top_p
            assert top_p < 1
            assert int((found ^ wanted).sum()) == 1
        held = values[row][kept]
        assert torch.equal(held, (logits[row] if ids is None else logits[row][ids[row]])[kept])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), greedy=st.booleans())
def test_rows_that_truncate_differently_share_a_batch(seed: int, greedy: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 400, generator=generator) * 2
    top_p = 1.0 if greedy else 0.95  # a greedy row keeps all; else each row has a top_p, and one a top_k
    mixed = RowSampling(
        temperature=torch.tensor([1.0, 0.5, 0.0 if greedy else 0.7]),
        top_k=torch.tensor([0, 5, 0]),
        top_p=torch.tensor([0.9, top_p, top_p]),
        min_p=torch.tensor([0.0, 0.1, 0.0]),
        stream=torch.tensor([11, 12, 13]),
    )
    index = torch.tensor([0, 3, 9])
    together = draw(logits, index, mixed, SamplingShape(any_greedy=greedy, min_p=True, top_p=True, max_top_k=-1))
    limited = SamplingShape(min_p=True, top_p=not greedy, max_top_k=5)
    shapes = [SamplingShape(top_p=True), limited, SamplingShape(all_greedy=greedy, top_p=not greedy)]
    for row, shape in enumerate(shapes):
        alone = RowSampling(**{name: value[row : row + 1] for name, value in vars(mixed).items()})
        token, logprob = draw(logits[row : row + 1], index[row : row + 1], alone, shape)
        assert int(token) == int(together[0][row])
        torch.testing.assert_close(logprob[0], together[1][row])


def test_greedy_tells_apart_what_differs_in_the_last_bit() -> None:
    best = torch.tensor(1.0)
    logits = torch.stack([torch.nextafter(best, torch.tensor(0.0)), best, torch.tensor(-3.0)]).expand(2, -1)
    asked = RowSampling(**{**vars(rows(2)), "temperature": torch.tensor([0.0, 1.0])})
    for shape in (SamplingShape(all_greedy=True), SamplingShape(any_greedy=True)):
        tokens, _ = draw(logits, torch.zeros(2, dtype=torch.int64), asked, shape)
        assert tokens[0] == 1


def test_a_row_is_drawn_alike_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    index, asked = torch.arange(64), rows(64, temperature=0.8)
    whole = draw(logits, index, asked, SamplingShape())
    monkeypatch.setattr("lightrft.engines.sampling._BLOCK", 1500)
    for one, other in zip(whole, draw(logits, index, asked, SamplingShape()), strict=True):
        assert torch.equal(one, other)


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """A thousand tokens of 1e-5 each beside one that has the rest."""
    logits = torch.full((1, 1001), math.log(1e-5))
    logits[0, 0] = math.log(1 - 1e-2)
    count = 20_000
    tokens, _ = draw(logits.expand(count, -1), torch.zeros(count, dtype=torch.int64), rows(count), SamplingShape())
    assert abs(int((tokens > 0).sum()) - 200) < 5 * math.sqrt(200)


def test_small_changes_of_the_logits_rarely_change_the_token() -> None:
    """Gumbel-max flips about as often as the noise is wide; here 1e-5 in 20,000 draws."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20_000, 64, generator=generator)
    asked, index = rows(20_000), torch.zeros(20_000, dtype=torch.int64)
    tokens, _ = draw(logits, index, asked, SamplingShape())
    shaken, _ = draw(logits + 1e-5 * torch.randn(logits.shape, generator=generator), index, asked, SamplingShape())
    assert int((tokens != shaken).sum()) <= 3


def test_logprobs_over_a_large_vocabulary_are_as_good_as_over_a_small_one() -> None:
    logits = 3 * torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits, torch.zeros(4, dtype=torch.int64), rows(4), SamplingShape())
    exact = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(1)).squeeze(1)
    assert (logprobs - exact).abs().max() < 2e-6


def test_logits_of_low_precision_are_sampled_in_float32() -> None:
    logits = torch.randn(8, 100).to(torch.bfloat16)
    index = torch.zeros(8, dtype=torch.int64)
    low, high = (draw(x, index, rows(8), SamplingShape()) for x in (logits, logits.float()))
    assert low[1].dtype == torch.float32
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])
