"""The trainer's end of the process that runs SGLang."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightrft.strategy.engine import EngineSpec
from lightrft.strategy.errors import NotBuiltError, RolloutError, WeightSyncError

from .options import environment

_SHOWN = 1500
# The host reports its own timeout; after this margin it counts as stuck.
_GRACE = 30.0
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (NotBuiltError, TimeoutError, ValueError, WeightSyncError)
}


class Link:
    """SGLang's process, from its start to its end."""

    def __init__(self, spec: EngineSpec) -> None:
        self._limit = spec.call_timeout
        self._log = tempfile.NamedTemporaryFile(prefix="lightrft-sglang-", suffix=".log")  # noqa: SIM115 - lives on
        mine, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightrft.engines.sglang.host", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment(spec, os.environ),
                start_new_session=True,
            )
        self._connection = Connection(mine.detach())

    def call(self, method: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        """Ask, and wait for the answer.

        :param timeout: seconds in which SGLang must answer; None: the spec's ``call_timeout``.
        :raises RolloutError: its process ended, is stuck, or SGLang failed.
        :raises TimeoutError, ValueError, NotBuiltError, WeightSyncError: as the method says.
        """
        limit = self._limit if timeout is None else timeout + _GRACE
        begun = time.monotonic()
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(limit):
                raise RolloutError(
                    f'engine "sglang" did not answer "{method}" within {time.monotonic() - begun:.0f} s; if it is only '
                    "slow, raise --engine_timeout; else shut it down and set it up again, or end the run and --resume "
                    f"it{self._said()}"
                )
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            raise RolloutError(
                f'engine "sglang": its process ended during "{method}" (exit code {self._process.returncode}); shut it '
                f"down and set it up again, or end the run and --resume it{self._said()}"
            ) from error
        if kind == "done":
            return value
        if kind in _ERRORS:
            raise _ERRORS[kind](value)
        raise RolloutError(f'engine "sglang" failed during "{method}": {kind}: {value}{self._said()}')

    def end(self) -> None:
        """End SGLang's processes: ask them, then kill them."""
        with contextlib.suppress(EOFError, OSError):
            self._connection.send(("stop", {}))
            self._connection.poll(20.0)
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _said(self) -> str:
        """The end of SGLang's output."""
        text = Path(self._log.name).read_text(errors="replace").strip()
        return f"\n---- the end of its output\n{text[-_SHOWN:]}" if text else ""
