"""Linear layers of a 16-bit model on a CPU without instructions for 16-bit products.

There torch multiplies 16-bit matrices many times slower than float32 ones. A product of the same factors in float32,
rounded to 16 bit at its end, is what the 16-bit product means: its sums are formed in float32 as well.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .device import multiplies


class _WideProduct(torch.autograd.Function):
    """``linear`` of 16-bit tensors, forward and backward by float32 products; nothing is kept in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        wide = gradient.float()
        flat = wide.flatten(0, -2)
        return (
            (wide @ weight.float()).to(x.dtype) if for_x else None,
            (flat.t() @ x.float().flatten(0, -2)).to(weight.dtype) if for_weight else None,
            flat.sum(0).to(weight.dtype) if for_bias else None,
        )


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by way of float32 where 16-bit products are slow.

    :param x: ``[..., in]``. :param weight: ``[out, in]``. :param bias: ``[out]`` or None.
    :return: ``[..., out]`` in the dtype of ``x``.
    """
    fits = x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if not fits or multiplies(x.device, x.dtype):
        return nn.functional.linear(x, weight, bias)
    return _WideProduct.apply(x, weight, bias)


def widen_products(model: nn.Module) -> None:
    """Let the linear layers of a model compute by :func:`wide_linear`. Nothing is done where that changes nothing."""
    if all(multiplies(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float16)):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    linear = nn.functional.linear if x.dtype == torch.float32 else wide_linear
    return linear(x, self.weight, self.bias)
