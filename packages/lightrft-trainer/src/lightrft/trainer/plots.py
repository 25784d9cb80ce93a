"""The run's curves as PNG files: reward, held-out accuracy, response length, drift, gradient norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# (file name, title, axis label, metrics to draw and what the legend calls them)
CURVES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("reward.png", "Mean reward", "reward", {"reward_mean": "sampled responses", "eval_reward": "held out (greedy)"}),
    ("accuracy.png", "Held-out accuracy (greedy)", "accuracy", {"eval_accuracy": ""}),
    ("response_length.png", "Response length", "tokens", {"response_length_mean": ""}),
    ("logprob_drift.png", "Engine against trainer: mean |Δ logprob|", "nats", {"logprob_drift": ""}),
    ("grad_norm.png", "Gradient norm before clipping", "norm", {"grad_norm": ""}),
)
COLORS = ("#1f77b4", "#d62728")
SMOOTHING_WINDOW = 20


def plot_curves(lines: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw every curve that has data; returns the files, each of which appears only when complete.

    :param lines: one mapping per step, as in metrics.jsonl; where several have a metric for a step, the last counts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, title, label, names in CURVES:
        drawn = {legend: points for name, legend in names.items() if (points := _points(lines, name))}
        if not drawn:
            continue
        figure = Figure(figsize=(7.0, 4.0), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for (legend, points), color in zip(drawn.items(), COLORS, strict=False):
            style: dict[str, Any] = {"color": color, "label": legend}
            steps, values = list(points), list(points.values())
            if len(points) < 2 * SMOOTHING_WINDOW:
                axes.plot(steps, values, **style, linewidth=1.2, marker="o")
            else:
                axes.plot(steps, values, color=color, linewidth=1.2, alpha=0.3)
                style["label"] = f"{legend}, mean of {SMOOTHING_WINDOW}".removeprefix(", ")
                axes.plot(steps, smooth(values, SMOOTHING_WINDOW), **style, linewidth=2)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, loc="best")
        if label in ("accuracy", "reward") and all(
            0 <= value <= 1 for points in drawn.values() for value in points.values()
        ):
            axes.set_ylim(-0.02, 1.02)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / file_name
        scratch = path.with_suffix(".tmp")
        figure.savefig(scratch, format="png")
        scratch.replace(path)
        written.append(path)
    return written


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the ``window - 1`` before it (fewer at the start)."""
    smoothed = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        smoothed.append(sum(part) / len(part))
    return smoothed


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """The metric by step, in the order of the steps."""
    points = {int(line["step"]): float(line[name]) for line in lines if line.get(name) is not None}
    return dict(sorted(points.items()))
