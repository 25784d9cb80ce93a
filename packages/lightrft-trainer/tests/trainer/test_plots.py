from __future__ import annotations

from pathlib import Path

import pytest

from lightrft.trainer.plots import plot_curves, smooth


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    lines = [{"step": s, "reward_mean": s / 100, "logprob_drift": None} for s in range(1, 80)]
    written = plot_curves(lines, tmp_path)
    assert [path.name for path in written] == ["reward.png"]
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_no_metrics_no_files(tmp_path: Path) -> None:
    assert plot_curves([], tmp_path) == []


def test_smoothing_is_a_trailing_mean() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == pytest.approx([1.0, 2.0, 4.0, 6.0])
