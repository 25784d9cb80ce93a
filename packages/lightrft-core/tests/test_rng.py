from __future__ import annotations

import json
import random

import numpy
import torch

from lightrft.strategy.rng import preserved_rng, restore_rng, rng_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(numpy.random.randn()),
        torch.rand(()).item(),
    ]


def test_a_state_that_went_through_json_gives_the_same_numbers() -> None:
    draw()  # an odd number of Gaussians, so that one is in store
    plain, tensors = rng_state(CPU)
    expected = [draw(), draw()]
    restore_rng(CPU, json.loads(json.dumps(plain)), {name: tensor.clone() for name, tensor in tensors.items()})
    assert [draw(), draw()] == expected


def test_a_guarded_block_leaves_no_trace_even_when_it_fails() -> None:
    plain, tensors = rng_state(CPU)
    expected = draw()
    restore_rng(CPU, plain, tensors)
    try:
        with preserved_rng(CPU):
            torch.manual_seed(0)
            draw()
            raise RuntimeError("an engine broke")
    except RuntimeError:
        pass
    assert draw() == expected
