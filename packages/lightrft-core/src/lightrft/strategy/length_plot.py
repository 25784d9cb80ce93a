"""The distribution of response lengths, as a picture every so many rollouts (``--plot_every``, ``--log_dir``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class LengthPlot:
    """Collects lengths and draws ``response_lengths_STEP.png`` into ``log_dir``.

    :param log_dir: None: nothing is drawn. :param every: draw every so many rollouts; -1: never.
    """

    def __init__(self, log_dir: str | None, every: int) -> None:
        self.log_dir, self.every = log_dir, every
        self.rollouts = 0
        self._lengths: list[int] = []

    @property
    def active(self) -> bool:
        return self.log_dir is not None and self.every > 0

    def record(self, lengths: Sequence[int], *, write: bool) -> Path | None:
        """Add one rollout's lengths in tokens; returns the picture's path if one was drawn (``write``: here)."""
        self.rollouts += 1
        self._lengths.extend(lengths)
        if not self.active or self.rollouts % self.every:
            return None
        collected, self._lengths = self._lengths, []
        if not write or not collected:
            return None
        assert self.log_dir is not None
        return draw_lengths(collected, Path(self.log_dir) / f"response_lengths_{self.rollouts:06d}.png", self.rollouts)


def draw_lengths(lengths: Sequence[int], path: Path, rollout: int) -> Path:
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
    bins = numpy.histogram_bin_edges(values, bins=min(50, max(1, int(values.max() - values.min()) + 1)))
    axes.hist(values, bins=bins.tolist(), color="#4477aa", edgecolor="white", linewidth=0.5)
    for value, label, style in ((median, "median", "-"), (high, "95 %", "--")):
        axes.axvline(value, color="#cc6677", linestyle=style, label=f"{label}: {value:.0f}")
    axes.set(
        xlabel="response length (tokens)",
        ylabel="responses",
        title=f"Response lengths up to rollout {rollout}, n = {len(values)}",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
