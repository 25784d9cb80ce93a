"""Tokens per second of the embedded engine against ``model.generate``, on the same prompts of mixed lengths.

    python tools/bench/hf_engine.py --model tiny smollm2 --threads 1

Both draw at temperature 1 and write exactly ``--new-tokens`` for every prompt, from random weights. Rounds alternate
between the two, so that whatever else the machine does meets both alike; the ratio is that of the medians. Where there
is an accelerator, both compute on it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.utils import logging as transformers_logging

from lightrft.engines.hf import HFEngine
from lightrft.strategy.device import local_device, synchronize
from lightrft.strategy.engine import EngineSpec, GenerationRequest
from lightrft.strategy.sampling import SamplingParams

log = logging.getLogger("bench.hf_engine")
TINY: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
MODELS: dict[str, Callable[[], Any]] = {
    "tiny": lambda: Qwen2Config(**TINY),
    "smollm2": lambda: LlamaConfig(  # SmolLM2-135M's shape
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": lambda: Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
}


def prompts_of(count: int, samples: int, shortest: int, longest: int, vocabulary: int) -> list[tuple[int, ...]]:
    """``count`` distinct prompts of mixed lengths, each ``samples`` times."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    distinct = [tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist()) for n in lengths]
    return [prompt for prompt in distinct for _ in range(samples)]


def left_padded(prompts: list[tuple[int, ...]], device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as ``generate`` takes them: int64 ids and mask, ``[prompts, longest]``."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def timed(act: Callable[[], Any]) -> float:
    """Seconds that ``act`` takes, and what it started on a device."""
    synchronize(local_device())
    begun = time.perf_counter()
    act()
    synchronize(local_device())
    return time.perf_counter() - begun


def measure(name: str, args: argparse.Namespace) -> None:
    """Alternate between engine and ``generate``, and report the ratio."""
    config = MODELS[name]()
    dtype = getattr(torch, args.dtype)
    device = local_device()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    prompts = prompts_of(args.prompts, args.samples, args.shortest, args.longest, config.vocab_size)
    new = args.new_tokens
    extra = {"enforce_eager": True} if args.enforce_eager else {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = HFEngine()
        engine.start(EngineSpec(pretrain=folder, dtype=dtype, device=device, extra=extra))
    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    requests = [GenerationRequest(prompt_token_ids=p, sampling=sampling) for p in prompts]
    batch = left_padded(prompts, device)
    model.to(device)

    def ours() -> None:
        outputs = engine.generate(requests)
        assert all(len(o.output_token_ids) == new for o in outputs)

    @torch.inference_mode()
    def theirs() -> None:
        out = model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=True, pad_token_id=0)
        assert out.shape[1] == batch["input_ids"].shape[1] + new

    ours()
    theirs()
    rounds = [(timed(ours), timed(theirs)) for _ in range(args.rounds)]
    mine, generate = (statistics.median(column) for column in zip(*rounds, strict=True))
    tokens = len(prompts) * new
    log.info(
        "%s %s on %s, %d prompts x %d samples, prompt lengths %d-%d, %d new tokens, %d thread(s), %d rounds: "
        "engine %.3f s (%.0f tokens/s, best %.3f s), generate %.3f s (%.0f tokens/s, best %.3f s), ratio %.2f",
        *(
            name,
            args.dtype,
            device,
            args.prompts,
            args.samples,
            args.shortest,
            args.longest,
            new,
            torch.get_num_threads(),
        ),
        *(args.rounds, mine, tokens / mine, min(r[0] for r in rounds)),
        *(generate, tokens / generate, min(r[1] for r in rounds), generate / mine),
    )


def main() -> None:
    """Read the arguments and measure each model."""
    parser = argparse.ArgumentParser(description="tokens per second of the embedded engine against model.generate")
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), default=["tiny", "smollm2"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--shortest", type=int, default=8)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.model:
        measure(name, args)


if __name__ == "__main__":
    main()
