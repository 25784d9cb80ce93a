"""The checks that need ranks: the parts of a run, one after the other, on a model that is thrown away."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lightrft.data.tasks import build_default_model, reverse_digits
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.sampling import SamplingParams
from lightrft.trainer.experience import Experience, ExperienceBatch, make_batch
from lightrft.trainer.forward import token_statistics
from lightrft.trainer.run import build_models, load_tokenizer, quiet_libraries

from .findings import ON_RANKS
from .judge import drift_problem, growth_problem, repeated
from .memory import MIB, Memory, memory_in_use, sleep_words
from .notebook import Entry, Notebook

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase
    from lightrft.strategy.engine import GenerationOutput
    from lightrft.strategy.weights import SyncReceipt

PROMPTS = 8
RESPONSE = 32
# Changes every weight, so that a sync that does nothing is noticed.
LEARNING_RATE = 1e-4
TEXTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was",
    "To make a cup of tea, first",
    "The sum of two and three is",
    "In the year 1969",
    "A triangle has",
    "My favourite colour is",
)


def examine(config: StrategyConfig, notebook: Notebook) -> None:
    """Make every check in turn. Collective. An error that ends a check is noted, then raised."""
    with tempfile.TemporaryDirectory(prefix="lightrft-doctor-model-") as scratch:
        with notebook.check("ranks") as entry:
            quiet_libraries()
            if config.pretrain is None:
                # Every rank makes its own, since nodes share no folder; once they have joined, transformers lets only
                # rank 0 write.
                build_default_model(scratch)
            strategy = get_strategy(config)
            strategy.setup_distributed()
            _join(strategy, entry)
        patient = Patient(strategy, scratch)
        for name in ON_RANKS[1:]:
            with notebook.check(name) as entry, strategy.together(f"doctor: {name}"):
                getattr(patient, name.replace(" ", "_"))(entry)
        strategy.engine_host.shutdown()


def _join(strategy: StrategyBase, entry: Entry) -> None:
    ranks = strategy.world_size
    total = strategy.all_reduce(strategy.rank + 1, "sum")
    if total != ranks * (ranks + 1) // 2:
        entry.problem(
            f"the ranks' sum is {total}, expected {ranks * (ranks + 1) // 2}",
            "check the network between the ranks, and gloo or NCCL",
        )
        return
    seconds = time.time() - psutil.Process().create_time()
    kind = strategy.device.type
    entry.text = f"{ranks} joined on {kind}, {seconds:.1f} s after they were started"
    entry.figures |= {"ranks": ranks, "device": kind}


class Patient:
    """A model, its optimizer and its engine. Each method is a check, a collective."""

    def __init__(self, strategy: StrategyBase, built_in: str) -> None:
        """:param built_in: the folder of the model that was made because there is no --pretrain."""
        self.strategy = strategy
        config = strategy.config
        # Only the actor is examined; every element of a sync is compared.
        self.config = dataclasses.replace(
            config,
            pretrain=config.pretrain or built_in,
            advantage_estimator="group_norm",
            init_kl_coef=0.0,
            reward_pretrain=None,
            enable_ema=False,
            verify_weights="full",
        )
        self.tokenizer: Any = None
        self.prompts: list[list[int]] = []
        self.actor: Any = None
        self.optimizer: Any = None
        self.greedy: list[GenerationOutput] = []
        self.sampled: list[GenerationOutput] = []

    # ---- checks ------------------------------------------------------------------------------------------------------
    def model(self, entry: Entry) -> None:
        """Read tokenizer and model."""
        texts = TEXTS
        if self.strategy.config.pretrain is None:
            texts = tuple(example.prompt for example in reverse_digits().held_out[:PROMPTS])
        self.tokenizer, _ = load_tokenizer(self.config, multimodal=False)
        self.prompts = self.tokenizer(list(texts))["input_ids"]
        self.actor = build_models(self.strategy, self.config, multimodal=False)[0]
        parameters = sum(parameter.numel() for parameter in self.actor.parameters())
        entry.text = f"{parameters / 1e6:.3g}M parameters, {len(self.tokenizer)} tokens in its vocabulary"
        entry.figures |= {"parameters": parameters}

    def training(self, entry: Entry) -> None:
        """Shards for the ranks, and a step that moves the weights."""
        begun = time.monotonic()
        self.actor = self.strategy.prepare_model(self.actor, is_training=True)
        self.optimizer = self.strategy.create_optimizer(self.actor, lr=LEARNING_RATE)
        built = time.monotonic()
        rows = [_sample(i, ids, len(ids) - 1) for i, ids in enumerate(self.prompts)]
        loss, norm = self._step(rows)
        entry.text = (
            f"prepared in {built - begun:.1f} s; a step in {time.monotonic() - built:.2f} s: loss {loss:.3f}, "
            f"gradient norm {norm:.3f}"
        )
        entry.figures |= {"loss": loss, "grad_norm": norm}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            entry.problem(
                "loss or gradient norm is not finite", "try --bf16 in place of --fp16, and check the model's weights"
            )

    def engine(self, entry: Entry) -> None:
        """Start the engine on the model's folder."""
        before, begun = memory_in_use(self.strategy.device), time.monotonic()
        self.strategy.setup_inference_engine(self.config, engine_type=self.config.engine_type)
        seconds, grown = time.monotonic() - begun, self._mean(memory_in_use(self.strategy.device) - before)
        entry.text = f"{self.config.engine_type} started in {seconds:.1f} s and took {grown}"
        entry.figures |= {"mib": grown.total / MIB, "mib_in_processes_of_its_own": grown.children / MIB}

    def weight_sync(self, entry: Entry) -> None:
        """Send the trained weights to the engine and compare every element."""
        receipt = self.strategy.update_engine_weights(self.actor)
        how = {
            "full": "every element compared",
            "sampled": "some elements of each tensor compared",
            "manifest": "names and shapes compared (this engine cannot read its weights back)",
        }[receipt.verified]
        mib, rate = receipt.nbytes / MIB, receipt.nbytes / max(receipt.seconds, 1e-9) / 1e9
        entry.text = (
            f"{receipt.tensors_received} of {receipt.tensors_expected} tensors arrived, {mib:.3g} MiB in "
            f"{receipt.seconds:.2f} s, {how}"
        )
        entry.figures |= {**_plain(receipt), "gb_per_second": rate}

    def generation(self, entry: Entry) -> None:
        """Time sampling after a first call that warms up; keep greedy answers for later comparison."""
        self.greedy = self._generate(temperature=0.0)
        begun = time.monotonic()
        self.sampled = self._generate(temperature=self.config.temperature, n=2)
        seconds = time.monotonic() - begun
        tokens = self.strategy.all_reduce(sum(len(output.output_token_ids) for output in self.sampled), "sum")
        entry.text = (
            f"{2 * PROMPTS} samples per rank, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s"
        )
        entry.figures |= {"tokens": tokens, "tokens_per_second": tokens / seconds}
        stale = {output.weight_version for output in self.sampled} - {self.strategy.engine_host.weight_version}
        if stale:
            entry.problem(
                f"samples come from weights of version {sorted(stale)}, but the last sync was "
                f"{self.strategy.engine_host.weight_version}",
                "report it with `lightrft doctor --json`",
            )

    def drift(self, entry: Entry) -> None:
        """Compare the engine's logprobs with the trainer's, and again after a step with learning rate 0."""
        if any(output.logprobs is None for output in self.sampled):
            entry.status, entry.text = "skipped", f"{self.config.engine_type} returns no logprobs to compare"
            return
        dtype, (mean, largest) = self.config.dtype_name, self._drift(self.sampled)
        entry.text = f"engine and trainer logprobs differ by {mean:.1e} on average, by {largest:.1e} at most"
        entry.figures |= {"mean": mean, "max": largest}
        cure = (
            "engine and trainer must compute in the same dtype (--bf16 for both); a quantized or patched model always "
            "differs; --importance_sampling_cap 2 corrects a difference that remains"
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._step([_experience(i, output) for i, output in enumerate(self.sampled)])
        receipt = self.strategy.update_engine_weights(self.actor)
        after, largest_after = self._drift(self._generate(temperature=self.config.temperature, n=2))
        entry.figures |= {"mean_after": after, "max_after": largest_after, "changed": receipt.tensors_changed}
        entry.text += f"; after a step with learning rate 0 and a sync by {after:.1e}"
        if problem := drift_problem(mean, largest, dtype):
            entry.problem(problem, cure)
        if receipt.tensors_changed:
            entry.problem(
                f"{receipt.tensors_changed} tensors changed in a step with learning rate 0",
                f"the training backend {self.config.backend!r} changes weights by itself: check --l2 and its version",
            )
        if problem := growth_problem(mean, after, dtype):
            entry.problem(problem, cure)

    def sleep(self, entry: Entry) -> None:
        """Let the engine sleep; measure the memory that this frees, and whether its answers stay the same."""
        level, host, engine = self.config.engine_sleep_level, self.strategy.engine_host, self.strategy.inference_engine
        name, device = self.config.engine_type, self.strategy.device
        capabilities = host.engine_class(name).capabilities
        if level not in capabilities.sleep_levels:
            entry.status, entry.text = "skipped", f"{name} has no sleep level {level}"
            return
        before = memory_in_use(device)
        freed = self.strategy.all_reduce(float(host.sleep_engine(engine) if engine is not None else 0))
        self.strategy.sync_and_clear_cache()
        back = self._mean(before - memory_in_use(device))
        self.strategy.wakeup_inference_engine()
        if level == 2:
            self.strategy.update_engine_weights(self.actor)
        again = self._generate(temperature=0.0)
        status, equal = repeated(
            [output.output_token_ids for output in self.greedy],
            [output.output_token_ids for output in again],
            self.config.dtype_name,
        )
        given = f"level {level} freed {freed / MIB:.1f} MiB per rank (measured: {back.total / MIB:.1f})"
        said = sleep_words(given, name, capabilities, level, device.type)
        entry.text = f"{said}; after waking, {equal} of {len(again)} greedy answers are the same"
        entry.figures |= {"level": level, "freed_mib": freed / MIB, "free_gain_mib": back.total / MIB, "equal": equal}
        if status != "ok":
            entry.problem(
                "the engine answers differently after waking",
                "pass --disable_engine_sleep, or another --engine_sleep_level; most likely the engine is not "
                "of a tested version",
                status,
            )

    # ---- parts -------------------------------------------------------------------------------------------------------
    def _mean(self, memory: Memory) -> Memory:
        """The mean over ranks: of ranks that share an engine, one may hold all of it."""
        return Memory(**self.strategy.all_reduce(dataclasses.asdict(memory)))

    def _generate(self, *, temperature: float, n: int = 1) -> list[GenerationOutput]:
        longest = max(len(prompt) for prompt in self.prompts)
        room = (self.config.max_model_len or longest + RESPONSE) - longest
        sampling = SamplingParams(n=n, temperature=temperature, max_tokens=max(1, min(RESPONSE, room)))
        return self.strategy.gather_and_generate(
            sampling,
            all_prompt_token_ids=self.prompts,
            sleep_engine=False,
            prompt_indices=range(len(self.prompts)),
            step=0,
        )

    def _batch(self, samples: Sequence[Experience]) -> ExperienceBatch:
        return make_batch(samples, self.tokenizer.pad_token_id or 0, self.strategy.device, ())

    def _step(self, samples: Sequence[Experience]) -> tuple[float, float]:
        """Loss (mean over ranks) and gradient norm of one optimizer step that makes the responses likelier."""
        batch = self._batch(samples)
        logprobs = token_statistics(self.actor, batch, self.config.temperature).logprobs
        loss = -(logprobs * batch.mask).sum() / batch.mask.sum().clamp(min=1)
        share = 1.0 / self.strategy.world_size
        self.strategy.backward(loss, self.actor, self.optimizer, scale=share, boundary=True)
        result = self.strategy.optimizer_step(self.optimizer, self.actor, None, name="actor")
        return self.strategy.all_reduce(float(loss.detach())), result.grad_norm or 0.0

    @torch.no_grad()
    def _drift(self, outputs: Sequence[GenerationOutput]) -> tuple[float, float]:
        """Mean and largest difference of logprobs over the tokens of all ranks."""
        samples = [_experience(i, output) for i, output in enumerate(outputs)]
        batch = self._batch(samples)
        mine = token_statistics(self.actor, batch, self.config.temperature).logprobs
        theirs = torch.zeros_like(mine)
        for row, output in enumerate(outputs):
            assert output.logprobs is not None
            start = len(output.prompt_token_ids)
            theirs[row, start : start + len(output.logprobs)] = torch.tensor(output.logprobs, device=theirs.device)
        distance = ((mine - theirs) * batch.mask).abs()
        sums = self.strategy.all_reduce({"sum": float(distance.sum()), "tokens": float(batch.mask.sum())}, "sum")
        return sums["sum"] / max(1.0, sums["tokens"]), self.strategy.all_reduce(float(distance.max()), "max")


def _sample(index: int, tokens: Sequence[int], response: int) -> Experience:
    return Experience(
        index=index, prompt_index=index, tokens=torch.tensor(list(tokens), dtype=torch.long), response_length=response
    )


def _experience(index: int, output: GenerationOutput) -> Experience:
    return _sample(index, [*output.prompt_token_ids, *output.output_token_ids], response=len(output.output_token_ids))


def _plain(receipt: SyncReceipt) -> dict[str, Any]:
    names = ("version", "tensors_expected", "tensors_received", "tensors_changed", "nbytes", "buckets", "verified")
    return {name: getattr(receipt, name) for name in names}
