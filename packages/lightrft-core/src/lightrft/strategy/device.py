"""Which device this process computes on: the only place that asks torch for one."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch


def local_device(local_rank: int = -1) -> torch.device:
    """This rank's accelerator, or the CPU where there is none.

    :param local_rank: used if LOCAL_RANK is not set; -1: the first.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    index = int(os.environ.get("LOCAL_RANK", max(0, local_rank))) % max(torch.accelerator.device_count(), 1)
    return torch.device(kind.type, index)


def process_group_backend(device: torch.device) -> str:
    """gloo on a CPU; on an accelerator its own library for tensors there, and gloo for tensors on the CPU."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{torch.distributed.get_default_backend_for_device(device)}"


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on ``device``; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Hand cached device memory back to the driver."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def widens_products(device: torch.device) -> bool:
    """Whether ``torch.mm`` there multiplies 16-bit matrices into fp32 (``out_dtype``), on tensor cores."""
    return device.type == "cuda"


@functools.cache
def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products in this dtype are as fast there as in float32: not on every CPU."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return has is None or bool(has())


def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and runs there."""
    return device.type == "cuda"


@functools.cache
def attends_in_segments(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has its own variable-length attention kernel there, forward and backward."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def replays_graphs(device: torch.device) -> bool:
    """Whether kernels can be captured and replayed there as a graph (a CUDA graph)."""
    return device.type == "cuda"


class GraphPool:
    """Graphs of kernels (CUDA graphs) that share one pool of memory: they are replayed one at a time.

    :param device: where the kernels run, which need not be the current device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, launch: Callable[[], object]) -> Callable[[], None]:
        """Capture what ``launch`` launches; the result launches it again, with the same addresses.

        ``launch`` is run once before: libraries choose their kernels and take their memory at first use.

        :raises RuntimeError: it waits for the device, or does something else that a graph cannot hold.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                launch()
                # Other threads (a collective's watchdog) go on with their own work meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    launch()
                except RuntimeError:
                    with contextlib.suppress(RuntimeError):  # it only says that the capture is broken
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            current.wait_stream(self._stream)
        return graph.replay
