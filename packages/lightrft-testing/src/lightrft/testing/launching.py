"""Real launches: a script under torch's elastic launcher, on one node or on several that share this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ranks import RANK_ENV


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """How one node's launcher ended: its exit code (None: it was late and was ended) and the output of its ranks."""

    returncode: int | None
    output: str


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(
    script: str | Path,
    *args: str,
    nproc_per_node: int = 1,
    nnodes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 240.0,
) -> list[NodeResult]:
    """Run ``script`` as ``torchrun --nnodes N --nproc-per-node M`` would on N machines: one launcher per node, all
    here.

    :return: one result per node, in order. No process is left, whatever happens.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(nnodes), "--nproc-per-node", str(nproc_per_node)),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
    ]
    with contextlib.ExitStack() as stack:
        nodes = []
        for node in range(nnodes):
            output = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [*command, "--node-rank", str(node), str(script), *args],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **RANK_ENV, **(env or {})},
                start_new_session=True,
            )
            stack.callback(_end, process)
            nodes.append((process, output))
        codes = _wait([process for process, _ in nodes], timeout)
        results = []
        for (_, output), code in zip(nodes, codes, strict=True):
            output.seek(0)
            results.append(NodeResult(returncode=code, output=output.read().decode(errors="replace")))
        return results


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    deadline = time.monotonic() + timeout
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
