"""Memory in use: on the rank's device, or on a CPU by this process and those that it started."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil
import torch

from lightrft.strategy.engine import EngineCapabilities

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank.

    :param device: in use on its accelerator, by whichever process. :param own: of this process, on a CPU.
    :param children: of the processes that it started, and of theirs, on a CPU.
    """

    device: float = 0.0
    own: float = 0.0
    children: float = 0.0

    @property
    def total(self) -> float:
        return self.device + self.own + self.children

    def __sub__(self, other: Memory) -> Memory:
        return Memory(
            device=self.device - other.device, own=self.own - other.own, children=self.children - other.children
        )

    def __str__(self) -> str:
        # Any library may start a helper process of a few MiB.
        worth_saying = self.children > self.total / 10
        # The rank's own memory may have shrunk meanwhile, which makes the children's part larger than the total.
        part = "all" if self.children >= self.total else f"{self.children / MIB:.0f}"
        apart = f", {part} of it in processes that it started" if worth_saying else ""
        return f"{self.total / MIB:.0f} MiB per rank{apart}"


def memory_in_use(device: torch.device) -> Memory:
    """What this rank holds now."""
    if device.type != "cpu":
        free, whole = torch.accelerator.get_memory_info(device)
        return Memory(device=whole - free)
    me = psutil.Process()
    return Memory(own=_share(me), children=sum(map(_share, me.children(recursive=True))))


def _share(process: psutil.Process) -> int:
    """Bytes of a process. On Linux, pages that forked processes share are divided among them."""
    with contextlib.suppress(psutil.Error):  # it has just ended, or is not ours to look into
        counted = process.memory_full_info()
        return getattr(counted, "pss", 0) or counted.rss
    return 0


def sleep_words(given: str, engine: str, capabilities: EngineCapabilities, level: int, device_type: str) -> str:
    """What a sleep freed, and what it could not. Pure. :param given: the former, in words."""
    if device_type not in capabilities.keeps_kv_cache_on:
        return given
    if level == 1 and device_type == "cpu":
        return (
            f"level 1 frees nothing: on a CPU {engine} keeps its KV cache, and its weights are in host memory already"
        )
    return f"{given}, without the KV cache, which {engine} keeps on {device_type}"
