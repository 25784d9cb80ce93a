"""Memory figures of a device or of this process."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, kw_only=True)
class MoveReport:
    """What moving a model or an optimizer took: bytes moved and seconds.

    :param note: why nothing was moved, if a backend keeps these tensors in one place.
    """

    nbytes: int
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        took = f"{self.nbytes / 2**20:.1f} MiB in {self.seconds:.3f} s"
        return f"{took}: {self.note}" if self.note else took


def memory_figures(device: torch.device) -> dict[str, float]:
    """Figures in GiB: an accelerator's allocated, reserved, peak and free memory, or on a CPU the process's own.

    :return: keys ``rss`` (this process), ``available`` (this host), and on an accelerator ``allocated``, ``reserved``,
        ``peak``, ``device_free``.
    """
    figures = {"rss": psutil.Process().memory_info().rss, "available": psutil.virtual_memory().available}
    if device.type != "cpu":
        stats = torch.accelerator.memory_stats(device)
        figures |= {
            "allocated": stats.get("allocated_bytes.all.current", 0),
            "reserved": stats.get("reserved_bytes.all.current", 0),
            "peak": stats.get("allocated_bytes.all.peak", 0),
            "device_free": torch.accelerator.get_memory_info(device)[0],
        }
    return {name: value / 2**30 for name, value in figures.items()}
