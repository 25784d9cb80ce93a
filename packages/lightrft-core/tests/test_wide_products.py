"""16-bit linear layers by way of float32: the same numbers to 16-bit rounding, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightrft.strategy import wide_products
from lightrft.strategy.wide_products import wide_linear, widen_products


def outcome(layer: nn.Module, half: torch.dtype, dtype: torch.dtype) -> list[torch.Tensor]:
    """Result and gradients, of input and weights, for numbers of the dtype ``half``, computed in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=generator).to(half).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator).to(half).to(dtype))
    found = [y, x.grad, *(p.grad for p in layer.parameters())]
    assert all(part is not None and part.dtype == dtype for part in found)
    return [part.detach().double() for part in found if part is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_wide_products_are_as_near_to_float64_as_a_rounding(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool
) -> None:
    monkeypatch.setattr(wide_products, "multiplies", lambda device, dtype: False)
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=bias, dtype=dtype)
    exact = outcome(copy.deepcopy(layer).double(), dtype, torch.float64)
    widen_products(layer)
    for one, other in zip(outcome(layer, dtype, dtype), exact, strict=True):
        assert ((one - other).abs() <= torch.finfo(dtype).eps * (other.abs() + 1e-2)).all()
    # The copy of a layer computes with its own weights.
    copied = copy.deepcopy(layer)
    nn.init.zeros_(copied.weight)
    assert (copied(torch.ones(1, 64, dtype=dtype)) == (0 if copied.bias is None else copied.bias)).all()


def test_frozen_weights_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_products, "multiplies", lambda device, dtype: False)
    weight = torch.randn(4, 8).bfloat16()
    x = torch.randn(2, 8).bfloat16().requires_grad_()
    wide_linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize(
    ("x", "weight", "multiplies"),
    [(torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, True)],
)
def test_what_is_fast_is_left_alone(monkeypatch: pytest.MonkeyPatch, x: Any, weight: Any, multiplies: bool) -> None:
    monkeypatch.setattr(wide_products, "multiplies", lambda device, dtype: multiplies or dtype == torch.float32)
    result = wide_linear(torch.ones(2, 8, dtype=x), torch.ones(4, 8, dtype=weight).requires_grad_())
    assert result.grad_fn is not None and "WideProduct" not in result.grad_fn.name()
