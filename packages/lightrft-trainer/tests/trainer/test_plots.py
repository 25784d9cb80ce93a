from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lightrft.trainer.plots import plot_curves, smooth


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    lines = [{"step": s, "reward_mean": s / 100, "logprob_drift": None} for s in range(1, 80)]
    written = plot_curves(lines, tmp_path)
    assert [path.name for path in written] == ["reward.png"]
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_the_held_out_reward_is_drawn_beside_that_of_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}

    def savefig(figure: Figure, path: Path, **_: str) -> None:
        drawn[path.stem] = figure.axes[0]
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    measured = [{"step": s, "reward_mean": -float(s), "eval_reward": -2.0 if s == 2 else None} for s in (1, 2, 3)]
    evaluations = [{"step": s, "eval_accuracy": 0.0, "eval_reward": -float(s)} for s in (0, 2)]
    plot_curves([*measured, *evaluations], tmp_path)
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn["reward"].lines}
    assert curves == {
        "sampled responses": ([1, 2, 3], [-1.0, -2.0, -3.0]),
        "held out (greedy)": ([0, 2], [0.0, -2.0]),
    }
    assert drawn["reward"].get_legend() is not None
    assert drawn["accuracy"].get_legend() is None, "its title says it"


def test_no_metrics_no_files(tmp_path: Path) -> None:
    assert plot_curves([], tmp_path) == []


def test_smoothing_is_a_trailing_mean() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == pytest.approx([1.0, 2.0, 4.0, 6.0])
