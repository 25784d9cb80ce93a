"""Decoding steps replayed as graphs of kernels: on a GPU a small model's token waits for a thousand launches.

A graph serves one number of rows and one number of slots. Both are rounded up, so that a generation records few: rows
beyond the living ones compute something that nobody reads, and slots beyond the longest row are masked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cache import SlotCache
from .step import DecoderModel, StepInputs, forward

log = logging.getLogger(__name__)

_WORTH = 8  # steps that repay recording a graph, which takes about as long as three
_SLOTS = 64

Record = Callable[[Callable[[], object]], Callable[[], object]]


def rounded_rows(rows: int, most: int) -> int:
    """The rows of the graph for ``rows``: 1, 2, 3, 4, 6, 8, 12, 16, 24 ..., and ``most`` at most."""
    power = 1 << (rows.bit_length() - 1)
    step = max(1, power // 2)
    return min(-(-rows // step) * step, most)


def rounded_slots(slots: int, most: int) -> int:
    """The slots of the graph for ``slots``: multiples of 64, and further apart from 512 on; ``most`` at most."""
    step = max(_SLOTS, (1 << (slots.bit_length() - 1)) // 4)
    return min(-(-slots // step) * step, most)


@dataclass(frozen=True)
class GraphShape:
    """The rows and slots of the graph that a batch's steps use now.

    :param worth: whether enough steps would use it. The batch alone decides this, and not what was recorded for others:
        a resumed run computes the same as one that was not interrupted.
    """

    rows: int
    slots: int
    worth: bool

    @classmethod
    def next(cls, last: GraphShape | None, *, rows: int, slots: int, most: tuple[int, int], left: int) -> GraphShape:
        """For ``rows`` rows, of which the longest has ``slots`` slots.

        :param last: the step's before. :param most: rows and slots that there are. :param left: steps to come.
        """
        wanted = rounded_rows(rows, most[0]), rounded_slots(slots, most[1])
        if last is not None and wanted == (last.rows, last.slots):
            return last
        return cls(*wanted, worth=min(left, wanted[1] - slots + 1) >= _WORTH)


@dataclass(frozen=True)
class _Graph:
    inputs: StepInputs
    logits: torch.Tensor
    replay: Callable[[], object]


class StepGraphs:
    """The graphs of one model and its cache.

    :param record: captures what a function launches, and returns a function that launches it again
        (:meth:`lightrft.strategy.device.GraphPool.record`).
    """

    def __init__(self, m: DecoderModel, memory: SlotCache, record: Record) -> None:
        self.m, self.memory, self.record = m, memory, record
        self.usable = m.plain
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._layout = memory.layout
        self._logits: torch.Tensor | None = None  # [rows, vocabulary], for whichever graph runs

    def clear(self) -> None:
        """Forget all graphs, as weights or cache move to other addresses."""
        self._graphs.clear()
        self._logits = None

    def logits(self, inputs: StepInputs) -> torch.Tensor | None:
        """The step's logits ``[rows, vocabulary]``, valid until the next step; None if it has to be run as usual."""
        if self._layout != self.memory.layout:
            self.clear()
            self._layout = self.memory.layout
        key = (*inputs.masks[0].shape, inputs.positions.dim())
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._recorded(inputs)
            if graph is None:
                return None
            self._graphs[key] = graph
        else:
            for mine, given in zip(graph.inputs.tensors, inputs.tensors, strict=True):
                mine.copy_(given)
        graph.replay()
        return graph.logits

    def _recorded(self, inputs: StepInputs) -> _Graph | None:
        """A graph of this step, or None, for good, if the model's step is not the same kernels every time."""
        mine, rows = inputs.clone(), inputs.ids.shape[0]
        self.memory.asked = False
        if self._logits is None or self._logits.shape[0] < rows:
            example = forward(self.m, self.memory, mine)
            self._graphs.clear()
            self._logits = example.new_empty((max(rows, self.memory.rows), example.shape[-1]))
        out = self._logits[:rows]
        try:
            replay = self.record(lambda: out.copy_(forward(self.m, self.memory, mine)))
        except RuntimeError as error:  # torch's, for what waits for the device or allocates outside
            self._give_up(str(error).partition("\n")[0])
            return None
        if self.memory.asked:  # a number in Python would stay what it is now
            self._give_up("its forward asks the cache for its length")
            return None
        return _Graph(mine, out, replay)

    def _give_up(self, why: str) -> None:
        self.clear()
        self.usable = False
        log.info('engine "hf": %s decodes without CUDA graphs: %s', type(self.m.model).__name__, why)
