"""What ``gather_and_generate`` adds to a call of the engine with the same prompts.

    python tools/bench/engine_call.py --engine hf vllm --ranks 1 2

Each rank has an engine of its own and brings its own prompts. ``direct`` hands the engine finished requests; ``whole``
is ``strategy.gather_and_generate``: reading the prompts, the words with the other ranks, the samples' seeds, the
engine, the agreement on the outcome. Both write the same tokens. Rounds alternate, the ratio is that of the medians;
with several ranks a round ends when the last has ended. vLLM wants its environment:
``.nox/vllm_integration/bin/python``.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hf_engine import MODELS, prompts_of
from launch_ranks import ranks_command
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lightrft.fsdp import FSDPV2Strategy
from lightrft.strategy.prompts import make_prompts, make_requests
from lightrft.strategy.sampling import SamplingParams

log = logging.getLogger("bench.engine_call")


def timed(strategy: Any, run: Callable[[], Any]) -> float:
    """Seconds from when all ranks are there until the last has ended."""
    strategy.barrier()
    begun = time.perf_counter()
    run()
    strategy.barrier()
    return time.perf_counter() - begun


def measure(engine_type: str, args: argparse.Namespace) -> None:
    """Time the two in turn, on this rank's part of the prompts, and log them on rank 0."""
    extra = {"kv_cache_memory_bytes": 512 * 2**20} if engine_type == "vllm" else {}
    settings: dict[str, Any] = {"micro_train_batch_size": 1, "train_batch_size": int(os.environ["WORLD_SIZE"])}
    lengths = {"max_model_len": 512, "prompt_max_len": 64}
    strategy = FSDPV2Strategy(args={**settings, **lengths, "enable_engine_sleep": False, "engine_extra": extra})
    strategy.setup_distributed()
    config = MODELS[args.model]()
    torch.manual_seed(0)
    actor = strategy.prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    strategy.setup_inference_engine(None, engine_type, actor)
    everyone = prompts_of(args.prompts * strategy.world_size, 1, 8, 64, config.vocab_size)
    mine = everyone[strategy.rank :: strategy.world_size]
    sampling = SamplingParams(n=args.samples, max_tokens=args.new_tokens, ignore_eos=True)
    indices = list(range(strategy.rank, len(everyone), strategy.world_size))
    written: dict[str, Any] = {}
    prompts = make_prompts(mine, None, None, None)
    prompts = [replace(prompt, index=index) for prompt, index in zip(prompts, indices, strict=True)]
    requests = make_requests(prompts, sampling, strategy.config.seed, 0)

    def direct() -> None:
        assert strategy.inference_engine is not None
        written["direct"] = strategy.inference_engine.generate(requests)

    def whole() -> None:
        written["whole"] = strategy.gather_and_generate(
            sampling, all_prompt_token_ids=mine, sleep_engine=False, prompt_indices=indices, step=0
        )

    seconds: dict[str, list[float]] = {"direct": [], "whole": []}
    for counted in range(-1, args.rounds):
        order = (("direct", direct), ("whole", whole))
        for kind, run in order if counted % 2 else reversed(order):
            spent = timed(strategy, run)
            if counted >= 0:
                seconds[kind].append(spent)
    tokens = {kind: [list(output.output_token_ids) for output in outputs] for kind, outputs in written.items()}
    assert tokens["direct"] == tokens["whole"], "the two did not write the same"
    if strategy.is_rank_0():
        one, other = (statistics.median(seconds[kind]) for kind in ("direct", "whole"))
        log.info(
            "%s, %s, %d rank(s), %d prompts × %d samples × %d tokens a rank: engine alone %.3f s, gather_and_generate "
            "%.3f s: %.3f × (%+.1f ms); rounds %.3f to %.3f and %.3f to %.3f",
            *(engine_type, args.model, strategy.world_size, args.prompts, args.samples, args.new_tokens),
            *(one, other, other / one, (other - one) * 1e3),
            *(min(seconds["direct"]), max(seconds["direct"]), min(seconds["whole"]), max(seconds["whole"])),
        )
    strategy.engine_host.shutdown()


def main() -> None:
    """Start the ranks of each case in turn, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", nargs="+", default=["hf"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        for engine in args.engine:
            for size in args.ranks:
                words, environment = ranks_command(size)
                subprocess.run([*words, "--engine", engine], env=environment, check=True)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    measure(args.engine[-1], args)


if __name__ == "__main__":
    main()
