"""The run's prompts in order: batch after batch, episode after episode, from any position."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class PromptStream:
    """Draws batches from a loader for ``episodes`` passes, and keeps its position.

    The position counts batches of this episode. A strategy's own sampler goes to it directly; with any other one the
    batches before it are drawn and dropped.

    :param loader: an iterable of lists of prompts, which can be iterated again.
    :param batch_size: prompts of a batch over all ranks.
    """

    def __init__(self, loader: Iterable[list[Any]], *, episodes: int, batch_size: int) -> None:
        self.loader, self.episodes, self.batch_size = loader, episodes, batch_size
        self.episode = 0
        self.batches = 0
        self._iterator: Iterator[list[Any]] | None = None

    def __len__(self) -> int:
        """Batches of an episode."""
        return len(self.loader)  # type: ignore[arg-type]

    def draw(self) -> list[Any] | None:
        """This rank's next batch, or None after the last episode. An episode without a single batch ends the run."""
        while self.episode < self.episodes:
            if self._iterator is None:
                self._iterator = self._start()
            batch = next(self._iterator, None)
            if batch is not None:
                self.batches += 1
                return batch
            if self.batches == 0:
                return None
            self.episode, self.batches, self._iterator = self.episode + 1, 0, None
        return None

    def state_dict(self) -> dict[str, Any]:
        """The position, valid on any number of ranks, and a digest of the prompts if they have one."""
        position = {"episode": self.episode, "consumed_samples": self.batches * self.batch_size}
        return position if self.digest is None else {**position, "prompts": self.digest}

    @property
    def digest(self) -> str | None:
        """Of all prompts; None if the loader's dataset has none."""
        found = getattr(getattr(self.loader, "dataset", None), "digest", None)
        return found if isinstance(found, str) else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""
        self.episode = state["episode"]
        self.batches = state["consumed_samples"] // self.batch_size
        self._iterator = None

    def _start(self) -> Iterator[list[Any]]:
        sampler = getattr(self.loader, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is None:
            return itertools.islice(iter(self.loader), self.batches, None)
        if "consumed_samples" in inspect.signature(set_epoch).parameters:
            set_epoch(self.episode, consumed_samples=self.batches * self.batch_size)
            return iter(self.loader)
        set_epoch(self.episode)
        return itertools.islice(iter(self.loader), self.batches, None)
