"""The errors that LightRFT raises deliberately, so that a caller can catch those that it handles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self


class LightRFTError(Exception):
    """Base of LightRFT's own errors.

    ``of_another_rank``: this rank did its part and raises only because another one failed.
    """

    of_another_rank: bool = False

    @classmethod
    def echo(cls, text: str) -> Self:
        """The error of a rank that did its part; ``text`` starts with the rank that failed."""
        error = cls(text)
        error.of_another_rank = True
        return error


class ConfigError(LightRFTError, ValueError):
    """One or more settings are wrong. ``problems`` holds one sentence for each, all found in one pass."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        head = "1 setting is wrong:" if len(self.problems) == 1 else f"{len(self.problems)} settings are wrong:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class PluginError(LightRFTError, ImportError):
    """A strategy or an engine is missing, is installed twice, or was built for another core."""


class NotBuiltError(LightRFTError, NotImplementedError):
    """A backend or an engine cannot do what was asked; the message says what can."""


class EngineStateError(LightRFTError, RuntimeError):
    """An engine was asked for something that its lifecycle state does not allow."""


class StaleWeightsError(EngineStateError):
    """The engine's weights were discarded or only partly updated; it generates only after a complete update."""


class WeightSyncError(LightRFTError, RuntimeError):
    """A tensor was lost, duplicated, truncated, misnamed or altered on its way to the engine."""


class PromptError(LightRFTError, ValueError):
    """Another rank's prompts or sampling parameters were refused, so no rank generates."""


class RolloutError(LightRFTError, RuntimeError):
    """An engine broke its contract while generating: wrong count, wrong order, unknown request."""


class CheckpointError(LightRFTError, RuntimeError):
    """A checkpoint is missing, half-written, damaged, or belongs to another model."""


class HubLayoutError(LightRFTError, ValueError):
    """A model's parameters cannot be expressed under the names and shapes that it has on the hub."""


class UnfilledModelError(LightRFTError, ValueError):
    """A model was built on the meta device, and nothing says what its parameters are."""


class RankTimeoutError(LightRFTError, TimeoutError):
    """A rank was late; the message names the rank, the operation and where it was called."""
