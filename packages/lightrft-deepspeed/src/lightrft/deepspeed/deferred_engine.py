"""A module that becomes a DeepSpeed engine when its optimizer comes.

DeepSpeed wants model and optimizer at once; the documents prepare first and create the optimizer later. This wrapper
is what ``prepare`` hands out. It keeps the engine out of the module tree (an engine that is its own grandchild
recurses) and sends every forward pass through it: under ZeRO-3 a call of the raw module silently loses gradients.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

Operation = Callable[[str], contextlib.AbstractContextManager[None]]


class DeferredEngine(nn.Module):
    """``module`` is the user's own; attributes that the wrapper lacks are the module's.

    :param operation: the strategy's ``waits_for_ranks``, a bound method that is not kept alive: a sharded model waits
        for other ranks while it computes, and the one that does not come is named.
    """

    module: nn.Module

    def __init__(self, module: nn.Module, operation: Operation) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.__dict__["_operation"] = weakref.WeakMethod(operation)
        self.bind(None, None)

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine, or None while the module is called directly."""
        return self.__dict__["_engine"]

    @property
    def optimizer(self) -> Optimizer | None:
        """What the engine steps with, as the user holds it; None while the model does not train."""
        return self.__dict__["_optimizer"]

    def bind(self, engine: Any, optimizer: Optimizer | None) -> None:
        """Send forward passes through ``engine`` from now on (None: through the module).

        The engine ends with the wrapper: its hooks on autograd's nodes would keep engine and module alive for ever.
        """
        if (ending := self.__dict__.get("_ending")) is not None:
            ending.detach()
        self.__dict__["_engine"], self.__dict__["_optimizer"] = engine, optimizer
        self.__dict__["_ending"] = None
        if engine is not None:
            self.__dict__["_ending"] = ending = weakref.finalize(self, _end, engine)
            ending.atexit = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass, through the engine where there is one."""
        if self.engine is None:
            return self.module(*args, **kwargs)
        operation = self.__dict__["_operation"]()
        with operation("forward") if operation is not None else contextlib.nullcontext():
            return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> DeferredEngine:
        """Set the mode of the module and of its engine."""
        super().train(mode)
        if self.engine is not None:
            self.engine.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _end(engine: Any) -> None:
    """Let go of an engine's module. Without ranks the process is about to end, and DeepSpeed would ask for its own."""
    if dist.is_initialized():
        engine.destroy()
