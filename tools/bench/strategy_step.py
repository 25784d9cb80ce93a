"""A step through a strategy against the same loop in the raw backend, on two ranks.

    python tools/bench/strategy_step.py --model tiny smollm2 --backend fsdp zero1 zero2 zero3

The raw loop is what one writes without a strategy: ``fully_shard`` on every layer and on the root, fused AdamW and
``clip_grad_norm_``; or ``deepspeed.initialize`` with a fused AdamW. Both have the same decay groups and train the same
weights on the same rows, in fp32, one thread a rank; on accelerators where there are some (``--ranks 1`` on one). Steps
alternate between the two, so that whatever else the machine does meets both alike, and the medians are compared.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from hf_engine import MODELS
from launch_ranks import become_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from lightrft.strategy import get_strategy
from lightrft.strategy.device import local_device, process_group_backend, synchronize

log = logging.getLogger("bench.strategy_step")
ROWS, LENGTH, MAX_NORM = 2, 64, 1.0
BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp": True},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "fused": True}
WEIGHT_DECAY = 0.1
Step = Callable[[torch.Tensor], float]


def build(name: str) -> Any:
    """A model of the named shape, the same on every rank."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss, as both loops compute it."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def groups_of(model: Any) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not, in every loop: DeepSpeed flattens and communicates group by group."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def strategy_loop(name: str, backend: str, accumulation: int) -> Step:
    """One optimizer step through the strategy; returns the gradient norm."""
    batch = ROWS * dist.get_world_size() * accumulation
    settings = {"max_norm": MAX_NORM, "micro_train_batch_size": ROWS, "train_batch_size": batch}
    strategy = get_strategy({**settings, **BACKENDS[backend]})
    model = strategy.prepare(build(name))
    optimizer = strategy.create_optimizer(model, lr=ADAM["lr"], betas=ADAM["betas"], weight_decay=WEIGHT_DECAY)

    def step(rows: torch.Tensor) -> float:
        norm = None
        for part in rows.chunk(accumulation):
            strategy.backward(loss_of(model, part), model, optimizer)
            norm = strategy.optimizer_step(optimizer, model, None).grad_norm
        assert norm is not None
        return norm

    return step


def raw_loop(name: str, backend: str, accumulation: int) -> Step:
    """The same without a strategy."""
    return raw_fsdp(name, accumulation) if backend == "fsdp" else raw_zero(name, int(backend[-1]), accumulation)


def shard(model: Any) -> Any:
    """Each layer and the root, over all ranks."""
    mesh = init_device_mesh(local_device().type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def raw_fsdp(name: str, accumulation: int) -> Step:
    """FSDP2 as its tutorial has it."""
    model = shard(build(name).to(local_device()))
    optimizer = torch.optim.AdamW(groups_of(model), **ADAM)

    def step(rows: torch.Tensor) -> float:
        for part in rows.chunk(accumulation):
            (loss_of(model, part) / accumulation).backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor().item()

    return step


def raw_zero(name: str, stage: int, accumulation: int) -> Step:
    """DeepSpeed as its tutorial has it; the strategy has imported it so that it runs on a CPU."""
    import deepspeed

    model = build(name)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(groups_of(model), **ADAM)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)

    def step(rows: torch.Tensor) -> float:
        for part in rows.chunk(accumulation):
            engine.backward(loss_of(engine, part))
            engine.step()
        norm = engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)

    return step


def measure(name: str, backend: str, rounds: int, accumulation: int) -> None:
    """Time both loops in turn and log what came of it, on rank 0."""
    loops = {"strategy": strategy_loop(name, backend, accumulation), "raw": raw_loop(name, backend, accumulation)}
    seconds: dict[str, list[float]] = {kind: [] for kind in loops}
    vocabulary, device = MODELS[name]().vocab_size, local_device()
    for counted in range(-2, rounds):
        generator = torch.Generator().manual_seed(100 * counted + dist.get_rank() + 1000)
        rows = torch.randint(3, vocabulary, (ROWS * accumulation, LENGTH), generator=generator).to(device)
        norms = {}
        order = list(loops) if counted % 2 else list(reversed(loops))
        for kind in order:
            dist.barrier()
            begun = time.perf_counter()
            norms[kind] = loops[kind](rows)
            synchronize(device)
            if counted >= 0:
                seconds[kind].append(time.perf_counter() - begun)
        if abs(norms["strategy"] - norms["raw"]) > 1e-3 * norms["raw"]:
            raise SystemExit(f"{name}, {backend}: the loops part: gradient norms {norms}")
    if dist.get_rank() == 0:
        mine, raw = (statistics.median(seconds[kind]) for kind in ("strategy", "raw"))
        pairs = statistics.median(a / b for a, b in zip(seconds["strategy"], seconds["raw"], strict=True))
        log.info(
            "%s, %s, accumulation %d: strategy %.2f ms, raw %.2f ms: %.3f ×, %+.2f ms "
            "(median of ratios %.3f, %d rounds)",
            *(name, backend, accumulation, mine * 1e3, raw * 1e3, mine / raw, (mine - raw) * 1e3, pairs, rounds),
        )


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["tiny", "smollm2"])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["fsdp"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    become_ranks(args.ranks)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    device = local_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(process_group_backend(device))
    for backend in args.backend:
        for name in args.model:
            measure(name, backend, args.rounds * (5 if name == "tiny" else 1), args.accumulation)
            gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
