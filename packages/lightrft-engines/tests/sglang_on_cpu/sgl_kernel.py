"""What a CPU run of SGLang needs instead of its compiled kernels, which no index carries for a plain CPU.

SGLang imports kernels by name as it starts and calls none of them with plain torch attention and sampling. So every
name is there, and calling one says what happened. Put the folder above on PYTHONPATH; never install it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.4.10"  # SGLang compares it with the least that it wants

# Those that it takes from torch as it imports the processor of Qwen's vision-language models; nothing is behind them.
_OPS = torch.library.Library("sgl_kernel", "DEF")
for _name in (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
):
    _OPS.define(f"{_name}() -> ()")


def __getattr__(name: str) -> Callable[..., Any]:
    """A kernel of that name, as far as an import can tell."""
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: these tests run without SGLang's compiled kernels")

    return kernel
