from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightrft.strategy import length_plot
from lightrft.strategy.length_plot import LengthPlot, draw_lengths


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_comes_every_so_many_steps_from_the_rank_that_writes(tmp_path: Path) -> None:
    writer, other = (LengthPlot(str(tmp_path / name), 2) for name in ("a", "b"))
    drawn = [writer.record([1, 2, 3], step, write=True) for step in range(4)]
    assert [path and path.name for path in drawn] == [
        None,
        "response_lengths_000002.png",
        None,
        "response_lengths_000004.png",
    ]
    assert all(is_png(path) for path in drawn if path)
    assert [other.record([1], step, write=False) for step in range(4)] == [None] * 4
    assert not (tmp_path / "b").exists()


def test_a_step_of_several_rollouts_has_one_picture_of_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[int], int]] = []
    monkeypatch.setattr(
        length_plot, "draw_lengths", lambda lengths, path, step: drawn.append((list(lengths), step)) or path
    )
    plot = LengthPlot(str(tmp_path), 2)
    for step, lengths in ((0, [1]), (1, [2]), (1, [3]), (2, [4]), (3, [5])):
        plot.record(lengths, step, write=True)
    assert drawn == [([1, 2], 2), ([1, 2, 3], 2), ([4, 5], 4)]


def test_what_is_generated_in_a_pause_is_not_counted(tmp_path: Path) -> None:
    plot = LengthPlot(str(tmp_path), 1)
    with plot.paused():
        assert not plot.active
        assert plot.record([1], 0, write=True) is None
    assert plot.record([1], 0, write=True)


@pytest.mark.parametrize(("folder", "every"), [(None, 1), ("x", -1)])
def test_nothing_is_drawn_where_nobody_asked(folder: str | None, every: int) -> None:
    plot = LengthPlot(folder, every)
    assert not plot.active
    assert plot.record([1], 0, write=True) is None


def test_no_responses_give_no_picture(tmp_path: Path) -> None:
    assert LengthPlot(str(tmp_path), 1).record([], 0, write=True) is None


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 1000], list(range(500))])
def test_any_lengths_can_be_drawn(lengths: list[int], tmp_path: Path) -> None:
    assert is_png(draw_lengths(lengths, tmp_path / "deep" / "plot.png", 3))


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lightrft-core\[plots\].*--plot_every -1"):
        draw_lengths([1], tmp_path / "plot.png", 1)
