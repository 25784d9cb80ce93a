from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.models import entropy_from_logits, logprobs_from_logits, token_statistics_from_logits
from lightrft.models import logprobs as module


def reference(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies by PyTorch's own log_softmax in float64."""
    normalized = (logits.double() / temperature).log_softmax(-1)
    return normalized.gather(-1, labels[..., None])[..., 0], -(normalized.exp() * normalized).sum(-1)


def draw(shape: tuple[int, ...], *, scale: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


@given(
    rows=st.integers(0, 7),
    vocabulary=st.integers(1, 60),
    temperature=st.floats(0.3, 3.0),
    scale=st.floats(0.0, 5.0),
    chunk_rows=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_values_and_gradients_equal_float64_whatever_the_chunks(
    rows: int, vocabulary: int, temperature: float, scale: float, chunk_rows: int, seed: int
):
    logits, labels = draw((rows, vocabulary), scale=scale, seed=seed)
    weights = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed + 1))
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk_rows * vocabulary * 4)
        logprobs, entropies = token_statistics_from_logits(ours, labels, temperature=temperature, with_entropy=True)
        assert entropies is not None
        (logprobs @ weights[0] + entropies @ weights[1]).backward()
    expected_logprobs, expected_entropies = reference(theirs, labels, temperature)
    (expected_logprobs @ weights[0].double() + expected_entropies @ weights[1].double()).backward()
    tolerance = 1e-6 * max(1.0, float(logits.abs().max()) / temperature if logits.numel() else 1.0)
    assert torch.allclose(logprobs.double(), expected_logprobs, atol=2 * tolerance, rtol=1e-6)
    assert torch.allclose(entropies.double(), expected_entropies, atol=4 * tolerance, rtol=1e-6)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=10 * tolerance, rtol=1e-5)


def test_a_large_vocabulary_stays_within_1e_6_of_float64_relatively():
    logits, labels = draw((16, 50_000), scale=2.0)
    expected, expected_entropies = reference(logits, labels, 1.0)
    assert torch.allclose(logprobs_from_logits(logits, labels).double(), expected, rtol=1e-6, atol=0)
    assert torch.allclose(entropy_from_logits(logits).double(), expected_entropies, rtol=1e-6, atol=0)


def test_gradients_pass_gradcheck_in_float64():
    logits, labels = draw((3, 5), dtype=torch.float64)
    logits.requires_grad_()

    def both(x: torch.Tensor) -> Any:
        return token_statistics_from_logits(x, labels, temperature=0.7, with_entropy=True)

    assert torch.autograd.gradcheck(both, (logits,))


def test_logprobs_are_never_positive_even_where_one_token_has_all_the_mass():
    logits = torch.tensor([[1e4, 0.0, -1e4], [80.0, 80.0, 80.0]])
    logprobs = logprobs_from_logits(logits, torch.tensor([0, 1]))
    assert (logprobs <= 0).all()
    assert logprobs[0] == 0


def test_masked_tokens_have_no_part_in_the_entropy_and_no_gradient():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    logprobs, entropies = token_statistics_from_logits(logits, torch.tensor([1]), with_entropy=True)
    assert entropies is not None
    assert logprobs.item() == pytest.approx(-torch.log(torch.tensor(2.0)).item())
    assert entropies.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    (3 * logprobs.sum() + 3 * entropies.sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype):
    logits, labels = draw((8, 100), dtype=dtype)
    logits.requires_grad_()
    logprobs = logprobs_from_logits(logits, labels)
    assert logprobs.dtype == torch.float32
    assert (logprobs.double() - reference(logits, labels, 1.0)[0]).abs().max() < 5e-6
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


def test_only_one_logits_sized_tensor_is_made_and_none_is_kept():
    logits, labels = draw((64, 512))
    logits.requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs_from_logits(logits, labels)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_the_logits_are_only_read():
    logits, labels = draw((4, 9))
    before = logits.clone()
    logits.requires_grad_()
    logprobs_from_logits(logits, labels, temperature=0.5).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_leading_dimensions_are_kept():
    logits, labels = draw((2, 3, 7))
    assert logprobs_from_logits(logits, labels).shape == (2, 3)
    assert torch.equal(
        logprobs_from_logits(logits, labels).flatten(), logprobs_from_logits(logits.view(6, 7), labels.view(6))
    )


def test_wrong_shapes_and_temperatures_are_refused():
    logits, labels = draw((2, 3, 7))
    with pytest.raises(ValueError, match=r"labels need \(2, 3\)"):
        logprobs_from_logits(logits, labels[0])
    with pytest.raises(ValueError, match=r"temperature=0"):
        logprobs_from_logits(logits, labels, temperature=0)
