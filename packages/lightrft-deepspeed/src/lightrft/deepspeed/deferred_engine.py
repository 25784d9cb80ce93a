"""A module that becomes a DeepSpeed engine when its optimizer is created.

DeepSpeed needs model and optimizer together; the documents prepare first and create the optimizer later. So ``prepare``
returns this wrapper. It keeps the engine out of the module tree (which would be recursive) and sends every forward pass
through it: with ZeRO-3 a call of the raw module silently loses gradients.
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
    """``module`` is the user's; attributes that the wrapper does not have are the module's.

    :param operation: the strategy's ``waits_for_ranks``, a bound method that is not kept alive: a sharded model waits
        for other ranks while it computes, and a late one must be named.
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
        """The user's optimizer, with which the engine steps; None while the model does not train."""
        return self.__dict__["_optimizer"]

    def bind(self, engine: Any, optimizer: Optimizer | None) -> None:
        """Send forward passes through ``engine`` from now on (None: through the module).

        The engine ends with the wrapper: otherwise its autograd hooks would keep engine and module alive forever.
        """
        if (ending := self.__dict__.get("_ending")) is not None:
            ending.detach()
        self.__dict__["_engine"], self.__dict__["_optimizer"] = engine, optimizer
        self.__dict__["_ending"] = None
        if engine is not None:
            self.__dict__["_ending"] = ending = weakref.finalize(self, _end, engine)
            ending.atexit = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass, through the engine if there is one."""
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
    """Release an engine's module. Without a process group the process is about to end, and DeepSpeed would need one."""
    if dist.is_initialized():
        engine.destroy()
