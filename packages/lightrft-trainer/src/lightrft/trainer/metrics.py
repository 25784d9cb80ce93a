"""Where a step's figures are written: metrics.jsonl, TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.errors import PluginError

logger = logging.getLogger("lightrft")

METRICS_FILE = "metrics.jsonl"
# Every line has these; more may follow. Seconds are wall time of that part of the step, on the slowest rank.
# weight_version is the version in the engine after the step; sample_versions is the number of its samples by version:
# {"7": 512}.
STEP_KEYS = (
    "step",
    "reward_mean",
    "reward_std",
    "loss",
    "kl",
    "grad_norm",
    "response_length_mean",
    "tokens_per_second",
    "seconds_generate",
    "seconds_reward",
    "seconds_train",
    "seconds_sync",
    "logprob_drift",
    "weight_version",
    "sample_versions",
)
Figure = float | int | Mapping[str, int] | None


class MetricSink(Protocol):
    """Receives a step's figures."""

    def log(self, step: int, values: Mapping[str, Figure]) -> None:
        """Take figures by name; None means not measured in this step. Sinks of plain numbers skip mappings."""

    def close(self) -> None:
        """Write out what is buffered."""


class JsonlSink:
    """One JSON object per line. NaN and infinities become null, since JSON does not have them."""

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        """:param first_step: lines from this step on are dropped: the resumed run writes them again."""
        self.path = path
        kept = [line for line in read_metrics(path) if line.get("step", 0) < first_step] if first_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        scratch.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Figure]) -> None:
        """Append one line, visible to readers at once."""
        self._file.write(
            json.dumps({"step": step, **{name: _json_number(value) for name, value in values.items()}}) + "\n"
        )
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars under ``folder``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder))

    def log(self, step: int, values: Mapping[str, Figure]) -> None:
        """Write one scalar for each figure that was measured."""
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()


class TrackerSink:
    """Weights & Biases, or Trackio, which has the same interface."""

    def __init__(self, module: Any, project: str, name: str | None, config: Mapping[str, Any], folder: Path) -> None:
        self._module = module
        options = {"dir": str(folder)} if module.__name__ == "wandb" else {}
        module.init(project=project, name=name, config=dict(config), **options)

    def log(self, step: int, values: Mapping[str, Figure]) -> None:
        """Send the figures that were measured."""
        self._module.log(_numbers(values), step=step)

    def close(self) -> None:
        """End the tracked run."""
        self._module.finish()


def make_sinks(config: StrategyConfig, output_dir: Path, log_dir: Path, *, first_step: int = 0) -> list[MetricSink]:
    """The sinks that the settings ask for; call on rank 0 only.

    :raises PluginError: a tracker is asked for that is not installed.
    """
    sinks: list[MetricSink] = [JsonlSink(output_dir / METRICS_FILE, first_step=first_step)]
    installed = find_spec("tensorboard") is not None
    if config.use_tensorboard or (config.use_tensorboard is None and installed):
        if not installed:
            raise PluginError(
                '--use_tensorboard: TensorBoard is not installed; pip install "lightrft-trainer[tensorboard]"'
            )
        sinks.append(TensorBoardSink(log_dir / "tensorboard"))
    for name, wanted in (("wandb", config.use_wandb), ("trackio", config.use_trackio)):
        if not wanted:
            continue
        if find_spec(name) is None:
            raise PluginError(f'--use_{name}: {name} is not installed; pip install "lightrft-trainer[{name}]"')
        module = __import__(name)
        sinks.append(TrackerSink(module, config.wandb_project, config.wandb_run_name, config.to_dict(), log_dir))
    return sinks


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file, without one that a crash truncated."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            logger.warning("%s: dropped a truncated line", path)
            continue
        if isinstance(line, dict):
            yield line


def _numbers(values: Mapping[str, Figure]) -> dict[str, float | int]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _json_number(value: Figure) -> Figure:
    return None if isinstance(value, float) and not math.isfinite(value) else value
