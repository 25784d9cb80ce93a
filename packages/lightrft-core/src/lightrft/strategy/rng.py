"""The random state of this process: python, numpy, torch, and the accelerator, as plain data."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch


def rng_state(device: torch.device) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(JSON-able part, tensors). Restored by :func:`restore_rng`."""
    generator: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = generator
    version, internal, following = random.getstate()
    plain = {
        "python": [version, list(internal), following],
        "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
    }
    tensors = {"rng.numpy": torch.from_numpy(keys.astype("int64")), "rng.torch": torch.get_rng_state()}
    if device.type != "cpu":
        tensors["rng.device"] = torch.get_device_module(device).get_rng_state(device)
    return plain, tensors


def restore_rng(device: torch.device, plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`rng_state` returned."""
    version, internal, following = plain["python"]
    random.setstate((version, tuple(internal), following))
    kind, position, has_gauss, gauss = plain["numpy"]
    numpy.random.set_state((kind, tensors["rng.numpy"].numpy().astype("uint32"), position, has_gauss, gauss))
    torch.set_rng_state(tensors["rng.torch"])
    if device.type != "cpu" and "rng.device" in tensors:
        torch.get_device_module(device).set_rng_state(tensors["rng.device"], device)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restore the process's random state at the end: engines must not change the trainer's."""
    plain, tensors = rng_state(device)
    try:
        yield
    finally:
        restore_rng(device, plain, tensors)
