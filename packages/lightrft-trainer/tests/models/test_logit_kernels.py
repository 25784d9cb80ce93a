"""The kernels' arithmetic, by Triton's interpreter on a CPU; on a GPU they are compiled (see the tests marked gpu)."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightrft.models import fused_logprob, logit_kernels, token_statistics_from_logits
from lightrft.models.fused_logprob import fused_token_statistics

pytest.importorskip("triton", reason="Triton comes with torch for Linux on x86; its kernels cannot be read elsewhere")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("export TRITON_INTERPRET=1, as nox does: Triton asks for it as it is imported", allow_module_level=True)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_kernels, "runs_triton", lambda device: True)
    monkeypatch.setattr(logit_kernels, "LARGEST_BLOCK", 64)  # several blocks in a small vocabulary


def numbers(
    kind: torch.dtype,
    *,
    bias: bool,
    entropy: bool,
    temperature: float,
    chunk: int | None = None,
    masked: slice = slice(0),
    plain: bool = False,
) -> list[Tensor]:
    """Values and gradients: by the kernels, from hidden states or (chunk None) from logits; or by plain torch."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator) for rows in (9, 203))
    offset = torch.randn(203, generator=generator)
    labels = torch.randint(203, (9,), generator=generator)
    labels[:3] = torch.tensor([0, 63, 64])  # the edges of blocks
    offset[masked] = -torch.inf
    possible = offset.isfinite().nonzero()[:, 0]
    labels = possible[labels % len(possible)]
    by = torch.randn(2, 9, generator=generator)
    leaves = [t.to(kind).requires_grad_() for t in (hidden, weight, *([offset] if bias else []))]
    given_bias = leaves[2] if bias else None
    if plain:
        logits = nn.functional.linear(leaves[0], leaves[1], given_bias).to(torch.promote_types(kind, torch.float32))
        normalized = (logits / temperature).log_softmax(-1)
        logprobs = normalized.gather(-1, labels[:, None])[:, 0]
        entropies = -(normalized.exp() * normalized.clamp_min(-1e30)).sum(-1)
    elif chunk is None:
        logits = nn.functional.linear(leaves[0], leaves[1], given_bias)
        logprobs, entropies = token_statistics_from_logits(
            logits, labels, temperature=temperature, with_entropy=entropy
        )
    else:
        logprobs, entropies = fused_token_statistics(
            *leaves[:2], given_bias, labels, temperature=temperature, with_entropy=entropy, chunk_size=chunk
        )
    values = [logprobs, *([entropies] if entropy else [])]
    loss = sum(
        ((value * weights.to(value.dtype)).sum() for value, weights in zip(values, by, strict=False)),
        logprobs.sum() * 0,
    )
    gradients = torch.autograd.grad(loss, leaves)
    return [part.detach().double() for part in (*values, *gradients)]


@pytest.mark.parametrize("chunk", [None, 5, 4096])
@pytest.mark.parametrize(("bias", "entropy"), [(False, False), (True, True)])
def test_values_and_gradients_equal_float64(chunk: int | None, bias: bool, entropy: bool):
    options = {"bias": bias, "entropy": entropy, "temperature": 0.7}
    ours = numbers(torch.float32, chunk=chunk, **options)
    assert (ours[0] <= 0).all()
    for mine, exact in zip(ours, numbers(torch.float64, plain=True, **options), strict=True):
        assert torch.allclose(mine, exact, atol=1e-5, rtol=1e-5), (mine - exact).abs().max()


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded", "labels"])
def test_logits_and_labels_may_lie_in_memory_as_they_like(layout: str):
    generator = torch.Generator().manual_seed(0)
    logits = {
        "slice": torch.randn(9, 40, generator=generator)[:, :32],
        "transposed": torch.randn(32, 9, generator=generator).t(),
        "expanded": torch.randn(1, 32, generator=generator).expand(9, 32),
        "labels": torch.randn(9, 32, generator=generator),
    }[layout]
    pairs = torch.randint(32, (9, 2), generator=generator)
    labels = pairs[:, 1] if layout == "labels" else pairs[:, 1].contiguous()
    found = []
    for leaf, chosen in ((logits, labels), (logits.double().contiguous(), labels.contiguous())):
        leaf = leaf.detach().requires_grad_()
        logprobs, entropies = token_statistics_from_logits(leaf, chosen, temperature=0.7, with_entropy=True)
        assert entropies is not None
        (logprobs[::2].sum() + entropies.square().sum()).backward()
        assert leaf.grad is not None
        found.append([part.detach().double() for part in (logprobs, entropies, leaf.grad)])
    for mine, exact in zip(*found, strict=True):
        assert torch.allclose(mine, exact, atol=1e-5), (mine - exact).abs().max()


class OnTheSecondDevice(Tensor):
    device = torch.device("cuda", 1)  # type: ignore[assignment]


def test_a_kernel_starts_on_the_device_of_its_logits(monkeypatch: pytest.MonkeyPatch):
    from lightrft.models import triton_kernels

    current, launched = [0], []

    @contextlib.contextmanager
    def device_index(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: launched.append((grid, current[-1]))

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    for name in ("statistics_kernel", "gradients_kernel"):
        monkeypatch.setattr(triton_kernels, name, Kernel())
    logits, labels = torch.zeros(2, 5).as_subclass(OnTheSecondDevice), torch.zeros(2, dtype=torch.long)
    one = {"temperature": 1.0, "normalizers": torch.zeros(2), "entropies": None}
    logit_kernels.statistics(logits, labels, logprobs=torch.zeros(2), **one)
    logit_kernels.gradients(logits, labels, by_logprob=None, by_entropy=None, result=torch.zeros(2, 5), **one)
    assert launched == [((2,), 1), ((2, 1), 1)] and current == [0]


def test_logprobs_of_the_kernels_may_be_changed_in_place():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(32, 4)
    logprobs, _ = fused_token_statistics(hidden, weight, None, torch.tensor([1, 2, 3]))
    (once,) = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(logprobs.mul_(2).sum(), hidden)
    assert torch.allclose(twice, 2 * once)


def test_labels_of_hidden_states_may_be_a_column_of_others():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(32, 4, generator=generator)
    labels = torch.randint(32, (9, 2), generator=generator)[:, 1]
    found = []
    for chosen in (labels, labels.contiguous()):
        given = hidden.clone().requires_grad_()
        logprobs, _ = fused_token_statistics(given, weight, None, chosen, chunk_size=4)
        found.append((logprobs.detach(), torch.autograd.grad(logprobs.sum(), given)[0]))
    for strided, dense in zip(*found, strict=True):
        assert torch.equal(strided, dense)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 off where it makes bf16; a GPU rounds to the nearest, and here it does so too."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, of: Any, to: Any, mode: Any) -> Any:
        if (str(of), str(to)) != ("fp32", "bf16"):
            return convert(data, of, to, mode)
        return torch.from_numpy(data.astype("float32")).to(torch.bfloat16).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_kernels_are_no_further_from_float64_than_plain_torch(
    dtype: torch.dtype, temperature: float, rounding: None
):
    options = {"bias": True, "entropy": True, "temperature": temperature}
    exact, theirs = (numbers(kind, plain=True, **options) for kind in (torch.float64, dtype))
    for chunk in (5, None):
        for mine, other, true in zip(numbers(dtype, chunk=chunk, **options), theirs, exact, strict=True):
            assert (mine - true).norm() <= 1.01 * (other - true).norm()


# Whole blocks and parts of it too, also before anything else was seen.
@pytest.mark.parametrize("masked", [slice(200, 203), slice(53, 203), slice(150)], ids=["end", "most", "beginning"])
def test_masked_entries_of_the_vocabulary_give_no_nan(masked: slice):
    options = {"bias": True, "entropy": True, "temperature": 1.0, "masked": masked}
    ours, exact = numbers(torch.float32, chunk=7, **options), numbers(torch.float64, plain=True, **options)
    assert torch.allclose(ours[0], exact[0], atol=1e-5) and torch.allclose(ours[1], exact[1], atol=1e-5)
    assert all(part.isfinite().all() for part in ours) and (ours[3][masked] == 0).all()


@given(elements=st.integers(0, 10**6), tokens=st.integers(0, 2000), vocabulary=st.integers(1, 2000))
@example(elements=2**28, tokens=8192, vocabulary=151_936)
def test_parts_of_a_vocabulary_are_even_and_fit_their_memory(elements: int, tokens: int, vocabulary: int):
    parts = fused_logprob._parts(elements, tokens, vocabulary)
    widths = [part.stop - part.start for part in parts]
    assert [part.stop for part in parts] == list(itertools.accumulate(widths))
    assert parts[-1].stop == vocabulary and all(width == widths[0] for width in widths[:-1])
    assert widths[0] == 1 or widths[0] * tokens <= elements
    assert 0 < widths[-1] <= widths[0] and (len(parts) == 1 or widths[0] < 256 or widths[0] % 256 == 0)


def test_the_last_part_of_the_forward_pass_is_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    turns, product = [], fused_logprob._product
    monkeypatch.setattr(fused_logprob, "_product", lambda *arguments: (turns.append(1), product(*arguments))[1])
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(32, 4)
    logprobs, _ = fused_token_statistics(hidden, weight, None, torch.arange(6), chunk_size=2)
    found = []
    for products in (4, 7, 11):  # only the first backward pass finds logits in memory
        assert len(turns) == products
        found.append(torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_no_tokens_cost_one_turn_and_give_gradients_of_0(monkeypatch: pytest.MonkeyPatch):
    turns, product = [], fused_logprob._product
    monkeypatch.setattr(fused_logprob, "_product", lambda *arguments: (turns.append(1), product(*arguments))[1])
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((0, 4), (203, 4), (203,))]
    logprobs, entropies = fused_token_statistics(*leaves, torch.zeros(0, dtype=torch.long), with_entropy=True)
    assert entropies is not None and logprobs.shape == entropies.shape == (0,)
    gradients = torch.autograd.grad(logprobs.sum() + entropies.sum(), leaves)
    assert [part.shape for part in gradients] == [leaf.shape for leaf in leaves]
    assert not any(part.any() for part in gradients) and len(turns) == 1
