"""Seconds of a whole GRPO step (rollout, reward, training, weight sync) against TRL's, one rank each, in one run.

    uv run --no-sync --with trl==1.16.0 python tools/bench/grpo_step.py
    uv run --no-sync --with trl==1.16.0 python tools/bench/grpo_step.py --model FOLDER --prompts 4 --samples 4 \
        --new-tokens 48 --dtype bfloat16                    # or smollm2: random weights of that shape

Same model, prompts, samples, lengths (every response has exactly ``--new-tokens`` tokens), optimizer and learning
rate; no reference model and no gradient checkpointing on either side. Each side lives in a process of its own (in one
process both are slower by half: two pools of threads share the cores). Blocks of steps alternate between the two, so
that whatever else the machine does meets both alike; the ratio is that of the medians. Without TRL only ours is
measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hf_engine import MODELS, TINY
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightrft.data import PromptDataset
from lightrft.data.records import Record
from lightrft.models import ActorLanguage
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.trainer import SPMDPPOTrainer

log = logging.getLogger("bench.grpo_step")
SHAPES: dict[str, Callable[[], LlamaConfig]] = {
    "tiny": lambda: LlamaConfig(**TINY),
    "smollm2": MODELS["smollm2"],
}
LEARNING_RATE = 1e-5


def random_model(shape: str, folder: Path) -> Path:
    """A Llama of that shape, with a tokenizer of words w0, w1, ...

    Not a Qwen2: transformers would read the folder's tokenizer as Qwen2's own, whatever it is.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = SHAPES[shape]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts_for(tokenizer: Any, count: int, length: int) -> list[str]:
    """``count`` different prompts of about ``length`` tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(16, min(len(tokenizer), 30000), (count, length), generator=generator).tolist()
    return [tokenizer.decode(row) for row in rows]


def reward(completions: list[str]) -> list[float]:
    """Something that differs between samples and costs nothing."""
    return [len(set(text)) / 32 for text in completions]


class StepsOnly(SPMDPPOTrainer):
    """What is timed are steps: no checkpoint when a block of them ends."""

    def save_state(self, stream: Any = None) -> None:
        """Write nothing."""


class Ours:
    """LightRFT on FSDP2's world of one with the embedded engine; each call is one step."""

    def __init__(self, model: Path, prompts: list[str], args: argparse.Namespace, folder: Path) -> None:
        batch = args.prompts * args.samples
        self.config = StrategyConfig(
            fsdp=True,
            engine_type="hf",
            enable_engine_sleep=False,
            bf16=args.dtype == "bfloat16",
            pretrain=str(model),
            rollout_batch_size=args.prompts,
            n_samples_per_prompt=args.samples,
            micro_rollout_batch_size=batch,
            train_batch_size=batch,
            micro_train_batch_size=batch,
            generate_max_len=args.new_tokens,
            actor_learning_rate=LEARNING_RATE,
            init_kl_coef=0.0,
            lr_scheduler="constant",
            num_episodes=10**6,
            plot_every=-1,
            use_tensorboard=False,
            output_dir=str(folder),
        )
        strategy = get_strategy(self.config)
        tokenizer = AutoTokenizer.from_pretrained(model)
        records = [Record({"input": text, "label": ""}, str(i)) for i, text in enumerate(prompts)]
        data = PromptDataset(records, tokenizer, prompt_max_len=10**6)
        (actor, optimizer, scheduler), *_ = strategy.prepare_models_and_optimizers(
            ActorLanguage(str(model)), None, None, None, self.config, max_steps=10**6
        )
        strategy.setup_inference_engine(self.config, engine_type="hf")
        self.trainer = StepsOnly(
            strategy,
            actor,
            None,
            None,
            None,
            None,
            optimizer,
            None,
            scheduler,
            None,
            tokenizer=tokenizer,
            reward_fn=lambda prompts, responses, labels: reward(responses),
            min_new_tokens=args.new_tokens,
        )
        self.loader = strategy.setup_dataloader(data, args.prompts, collate_fn=data.collate_fn)
        self.done = 0

    def serve(self, blocks: Connection) -> None:
        """Trains block by block."""
        while steps := blocks.recv():
            blocks.send(self._run(steps))

    def _run(self, steps: int) -> list[float]:
        """Seconds of each of the next steps."""
        from lightrft.trainer.metrics import METRICS_FILE, read_metrics

        self.done += steps
        self.config.max_steps = self.trainer.config.max_steps = self.done
        self.trainer.fit(None, self.loader, consumed_samples=(self.done - steps) * self.config.rollout_batch_size)
        lines = read_metrics(self.trainer.output_dir / METRICS_FILE)[-steps:]
        return [line["seconds_total"] for line in lines]


class Theirs:
    """TRL's GRPOTrainer with the same settings."""

    def __init__(self, model: Path, prompts: list[str], args: argparse.Namespace, folder: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

        half = args.dtype == "bfloat16"
        config = GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=args.prompts * args.samples,
            num_generations=args.samples,
            max_completion_length=args.new_tokens,
            generation_kwargs={"min_new_tokens": args.new_tokens},
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            beta=0.0,
            num_iterations=1,
            gradient_checkpointing=False,
            bf16=half,
            use_cpu=not torch.accelerator.is_available(),
            model_init_kwargs={"dtype": args.dtype},
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            max_steps=10**6,
        )
        self.trainer = GRPOTrainer(
            model=str(model),
            reward_funcs=lambda completions, **_: reward(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        )

    def serve(self, blocks: Connection) -> None:
        """Trains block by block: TRL's loop cannot be left and entered, so that it waits in a callback."""
        from transformers import TrainerCallback

        class Stopwatch(TrainerCallback):
            left, seconds, begun = 0, [], 0.0

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if self.left == 0:
                    self.left, self.seconds = blocks.recv(), []
                control.should_training_stop = self.left == 0
                self.begun = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds.append(time.perf_counter() - self.begun)
                self.left -= 1
                if self.left == 0:
                    blocks.send(self.seconds)

        self.trainer.add_callback(Stopwatch())
        self.trainer.train()


CONTESTANTS = {"lightrft": Ours, "trl": Theirs}


def contestant(name: str, model: Path, args: argparse.Namespace, folder: Path, blocks: Connection) -> None:
    """A process: answers each number of steps that comes through ``blocks`` with their seconds, until 0 comes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = prompts_for(AutoTokenizer.from_pretrained(model), args.prompts, args.prompt_tokens)
    CONTESTANTS[name](model, prompts, args, folder).serve(blocks)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a model and its tokenizer, tiny or smollm2")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="samples a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="steps a round; a further round of each warms up")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    names = [name for name in CONTESTANTS if name == "lightrft" or importlib.util.find_spec(name) is not None]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = random_model(args.model, folder / "model") if args.model in SHAPES else Path(args.model)
        pipes, processes = {}, []
        for name in names:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=contestant, args=(name, model, args, folder / name, theirs)))
            processes[-1].start()
            theirs.close()
        for round_ in range(args.rounds + 1):
            for name in names:
                pipes[name].send(args.steps)
                measured = pipes[name].recv()
                if round_:
                    seconds[name] += measured
        for name, process in zip(names, processes, strict=True):
            pipes[name].send(0)
            process.join(30)
            process.kill()
    what = f"{args.prompts} prompts x {args.samples} samples x {args.new_tokens} tokens, {args.dtype}"
    threads = args.threads or torch.get_num_threads()
    log.info("%s, %d threads, %d steps each", what, threads, args.rounds * args.steps)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for key, values in seconds.items():
        log.info("  %-9s %.4f s a step (from %.4f to %.4f)", key, medians[key], min(values), max(values))
    if "trl" in medians:
        log.info("  ratio     %.2f", medians["lightrft"] / medians["trl"])
    else:
        log.info("  TRL is not installed: uv run --no-sync --with trl==1.16.0 python tools/bench/grpo_step.py")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
