from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lightrft.cli.output import outlive_reader


@pytest.mark.parametrize(
    ("opened", "end_of_line", "gone"), [(os.openpty, "\r\n", errno.EIO), (os.pipe, "\n", errno.EPIPE)]
)
def test_output_goes_on_without_its_reader(
    monkeypatch: pytest.MonkeyPatch, opened: Any, end_of_line: str, gone: int
) -> None:
    reader, ours = opened()
    with os.fdopen(ours, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        outlive_reader()
        assert sys.stdout.isatty() == (opened is os.openpty)
        sys.stdout.write("step 1 µ\n")
        sys.stdout.flush()
        assert os.read(reader, 100).decode() == f"step 1 µ{end_of_line}"
        os.close(reader)
        with pytest.raises(OSError, match=os.strerror(gone)):
            os.write(ours, b"x")
        sys.stdout.write("step 2\n")
        sys.stdout.flush()
        os.write(ours, b"from a library in C++")


def test_output_without_a_reader_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as file:
        for stream in (sys.stdout, file, None):
            monkeypatch.setattr(sys, "stdout", stream)
            outlive_reader()
            assert sys.stdout is stream


@pytest.mark.parametrize("opened", [os.openpty, None])
def test_what_cannot_be_encoded_is_written_in_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: Any
) -> None:
    reader, ours = opened() if opened else (os.open(tmp_path / "log", os.O_RDONLY | os.O_CREAT), None)
    stream = os.fdopen(ours, "w", encoding="ascii") if opened else (tmp_path / "log").open("w", encoding="ascii")
    with stream:
        monkeypatch.setattr(sys, "stdout", stream)
        outlive_reader()
        sys.stdout.write("é")
        sys.stdout.flush()
        assert os.read(reader, 100) == rb"\xe9"
    os.close(reader)
