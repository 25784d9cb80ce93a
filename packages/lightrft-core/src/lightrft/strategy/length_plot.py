"""Plots of the distribution of response lengths (``--plot_every``, ``--log_dir``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class LengthPlot:
    """Collects lengths and draws ``plots/response_lengths_STEP.png`` in ``log_dir``.

    :param log_dir: None: no plots. :param every: steps between plots; -1: never.
    """

    def __init__(self, log_dir: str | None, every: int) -> None:
        self.log_dir, self.every = log_dir, every
        self._lengths: list[int] = []
        self._drawn: int | None = None  # the step whose plot has these lengths
        self._paused = False

    @property
    def active(self) -> bool:
        return self.log_dir is not None and self.every > 0 and not self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore what is generated within it, such as the answers of an evaluation."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def record(self, lengths: Sequence[int], step: int, *, write: bool) -> Path | None:
        """Add one rollout's lengths in tokens; returns the plot's path if one was drawn (only with ``write``).

        :param step: counted from 0; another rollout of the same step draws its plot again.
        """
        if not self.active:
            return None
        if self._drawn not in (None, step):
            self._lengths, self._drawn = [], None
        self._lengths.extend(lengths)
        if (step + 1) % self.every:
            return None
        self._drawn = step
        if not write or not self._lengths:
            return None
        assert self.log_dir is not None
        return draw_lengths(
            self._lengths, Path(self.log_dir, "plots", f"response_lengths_{step + 1:06d}.png"), step + 1
        )


def draw_lengths(lengths: Sequence[int], path: Path, step: int) -> Path:
    """A histogram with median and 95th percentile.

    :raises ImportError: matplotlib is missing (install ``lightrft-core[plots]``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "lightrft-core[plots]", or pass --plot_every -1'
        ) from error
    import numpy

    values = numpy.asarray(lengths)
    median, high = numpy.percentile(values, [50, 95])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # At most 50 bars, each over the whole lengths that it counts.
    width = -(-(int(values.max() - values.min()) + 1) // 50)
    edges = numpy.arange(values.min(), values.max() + width + 1, width) - 0.5
    axes.hist(values, bins=edges.tolist(), color="#4477aa", edgecolor="white", linewidth=0.5)
    for value, label, style in ((median, "median", "-"), (high, "95 %", "--")):
        axes.axvline(value, color="#cc6677", linestyle=style, label=f"{label}: {value:.0f}")
    axes.set(
        xlabel="response length (tokens)",
        ylabel="responses",
        title=f"Response lengths up to step {step}, n = {len(values)}",
    )
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
