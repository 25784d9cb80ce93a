from __future__ import annotations

import errno
import os
import sys

import pytest

from lightrft.cli.terminal import outlive_terminal


def test_output_goes_on_without_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ours = os.openpty()
    with os.fdopen(ours, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        outlive_terminal()
        assert sys.stdout.isatty()
        sys.stdout.write("step 1 µ\n")
        assert os.read(terminal, 100).decode() == "step 1 µ\r\n"
        os.close(terminal)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.write(ours, b"x")
        sys.stdout.write("step 2\n")
        os.write(ours, b"from a library in C++")


def test_output_that_is_no_terminal_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    outlive_terminal()
    assert (sys.stdout, sys.stderr) == before
