"""Recording graphs of kernels, with stand-ins for CUDA's streams and graphs."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

from lightrft.strategy.device import GraphPool


class Graph:
    """A CUDA graph as far as recording goes; one that something was wrong with refuses to end."""

    def __init__(self, happened: list[str]) -> None:
        self.happened = happened

    def capture_begin(self, **_: Any) -> None:
        self.happened.append("begin")

    def capture_end(self) -> None:
        self.happened.append("end")
        if "wrong" in self.happened:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.happened.append("replay")


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    happened: list[str] = []

    def stream(name: str) -> Any:
        found = mock.Mock()
        found.wait_stream.side_effect = lambda other: happened.append(f"{name} waits")
        return found

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream(f"side stream of {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(f"stream of {device}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(happened))
    return happened


def test_what_is_launched_is_recorded_after_a_first_time_on_a_stream_of_its_device(happened: list[str]) -> None:
    replay = GraphPool(torch.device("cuda:1")).record(lambda: happened.append("launch"))
    replay()
    assert happened == [
        "side stream of cuda:1 waits",
        *("launch", "begin", "launch", "end"),
        "stream of cuda:1 waits",
        "replay",
    ]


def test_what_cannot_be_recorded_is_told_in_its_own_words(happened: list[str]) -> None:
    def launch() -> None:
        if "begin" in happened:
            happened.append("wrong")
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        GraphPool(torch.device("cuda:1")).record(launch)
    assert happened[-2:] == ["end", "stream of cuda:1 waits"]
