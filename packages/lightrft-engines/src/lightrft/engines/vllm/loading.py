"""The form in which vLLM stores loaded weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_layers_on_cpu() -> Iterator[None]:
    """Within it vLLM's CPU layers keep their weights as loaded.

    Otherwise it repacks them for oneDNN and drops the originals, so that they could be neither updated in place nor
    read back. torch's own linear uses oneDNN too.
    """
    from vllm.model_executor.layers import utils  # pyright: ignore[reportMissingImports]

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim != 2:
            original(layer, remove_weight)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    original, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original
