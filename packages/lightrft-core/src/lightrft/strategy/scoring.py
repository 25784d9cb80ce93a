"""Reward models in an engine: one score for each sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .collectives import all_gather_object
from .device import replays_graphs
from .engine import EngineSpec
from .errors import ConfigError, RolloutError
from .registry import load_plugin

if TYPE_CHECKING:
    from .strategy_base import StrategyBase


class ScoringEngine(ABC):
    """Runs a sequence classifier with one output. Register it in the entry-point group ``lightrft.scoring_engines``.

    Every rank of a tensor-parallel group runs it, with the same sequences.

    :cvar name: the value of ``--engine_type`` that selects it.
    :cvar devices: device types that it runs on.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    @abstractmethod
    def start(self, spec: EngineSpec, group: Any = None, *, cuda_graphs: bool = False) -> None:
        """Load the model that ``spec.pretrain`` names; it is awake afterwards.

        :param group: the tensor-parallel process group (None: this rank alone).
        :raises NotBuiltError: the engine cannot serve this model.
        """

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The model's output, no activation applied, at the last token of each sequence of token ids."""

    @abstractmethod
    def release(self) -> None:
        """Free memory: move weights to the host, drop caches. Repeating it does nothing."""

    @abstractmethod
    def restore(self) -> None:
        """Allocate the memory again and restore the weights. Repeating it does nothing."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free everything: memory, processes, shared memory. Repeating it does nothing."""


class RewardEngine:
    """A reward model in an engine, as a rank uses it: scores that rank's sequences, and sleeps between calls.

    :param pretrain: a folder or hub name of a sequence classifier.
    :param engine_type: the engine to use; None: ``--engine_type``.
    :raises PluginError: that engine serves no reward models.
    :raises ConfigError: it does not support the settings.
    """

    def __init__(self, strategy: StrategyBase, pretrain: str, engine_type: str | None = None) -> None:
        config, device = strategy.config, strategy.device
        cls: type[ScoringEngine] = load_plugin("scoring_engines", engine_type or config.engine_type)
        problems = []
        if device.type not in cls.devices:
            problems.append(f"--rm_use_engine: {cls.name} serves no reward model on {device.type}; drop the flag there")
        if config.rm_engine_cudagraph and not replays_graphs(device):
            problems.append(f"--rm_engine_cudagraph: there are no CUDA graphs on {device.type}; drop it")
        if problems:
            raise ConfigError(problems)
        self.pretrain = pretrain
        self._strategy, self._sleeps = strategy, config.enable_engine_sleep
        self._engine = cls()
        spec = EngineSpec.of(
            config,
            device,
            pretrain=pretrain,
            max_model_len=config.max_model_len or config.prompt_max_len + config.generate_max_len,
            extra=config.get_extra_arg("rm_engine_extra", {}),
        )
        self._engine.start(spec, strategy.engine_mp_group, cuda_graphs=config.rm_engine_cudagraph)
        self._rest()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score for each of this rank's sequences; ranks may have different numbers, or none. Every rank calls.

        :raises RolloutError: the engine returned another number of scores.
        """
        group = self._strategy.engine_mp_group
        with self._strategy.waits_for_ranks("score"):
            shares = [list(sequences)] if group is None else all_gather_object(list(sequences), group)
            everything = [sequence for share in shares for sequence in share]
            if not everything:
                return []
            self._engine.restore()
            scores = self._engine.score(everything)
            self._rest()
        if len(scores) != len(everything):
            raise RolloutError(f"engine {self._engine.name!r} gave {len(scores)} scores for {len(everything)} samples")
        mine = 0 if group is None else torch.distributed.get_rank(group)
        start = sum(map(len, shares[:mine]))
        return scores[start : start + len(sequences)]

    def shutdown(self) -> None:
        """End the engine. Repeating it does nothing."""
        self._engine.shutdown()

    def _rest(self) -> None:
        if self._sleeps:
            self._engine.release()
            self._strategy.sync_and_clear_cache()
