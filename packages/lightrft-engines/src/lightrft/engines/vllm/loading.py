"""What vLLM must leave as it is while it loads a model: the form of weights, and classes of transformers."""

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


@contextlib.contextmanager
def unchanged_classes() -> Iterator[None]:
    """Within it vLLM leaves transformers' classes as they are.

    Models that it runs by transformers' own code (Olmo 2, SmolLM3, SeedOss, ...) are compiled by a change of their
    class, which is that of the trainer's model too: that could then be neither called nor made again. They run without
    compilation instead.
    """
    from vllm.model_executor.models.transformers.base import Base  # pyright: ignore[reportMissingImports]

    original, Base._decorate_cls_for_torch_compile = Base._decorate_cls_for_torch_compile, lambda *_, **__: None
    try:
        yield
    finally:
        Base._decorate_cls_for_torch_compile = original
