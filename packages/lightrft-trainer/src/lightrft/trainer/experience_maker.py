"""From prompts to samples for training: generate, grade, evaluate the other models, compute advantages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from lightrft.strategy.hub_layout import unwrap
from lightrft.strategy.sampling import SamplingParams, sample_seed

from .advantages import discounted_returns, gae, group_scores, token_rewards, whiten
from .experience import Experience, ExperienceBatch, make_batch, split_rows
from .forward import evaluating, token_statistics, token_values
from .grading import Grader
from .kl import approximate_kl
from .kl_controller import FixedKLController
from .minibatches import cut_microbatches
from .replay_buffer import SampleRecord
from .reward_shaping import RewardShaping, RunningMoments

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase
    from lightrft.strategy.engine import GenerationOutput

    from .prompt_stream import PromptStream

logger = logging.getLogger("lightrft")


@dataclass
class Rollout:
    """The result of :meth:`ExperienceMaker.make_experience_list`.

    :param samples: this rank's. :param records: of every rank's samples, by global index.
    :param seconds: wall time on this rank, by part of the work. :param generated_tokens: on this rank, dropped ones
        included.
    :param groups_dropped: groups over all ranks that dynamic sampling dropped.
    :param trajectories: texts of some of this rank's samples, for the log.
    :param metrics: of each part of the rewards the sum and the number of this rank's samples that have it, dropped ones
        included.
    """

    samples: list[Experience]
    records: dict[int, SampleRecord]
    seconds: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "reward": 0.0, "experience": 0.0})
    generated_tokens: int = 0
    groups_dropped: int = 0
    trajectories: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)


def sums_and_counts(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Added up by name; a reward may name other parts from call to call, and from rank to rank."""
    names = sorted({name for part in parts for name in part})
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: (sum(value for value, _ in held), sum(count for _, count in held)) for name, held in found.items()}


@dataclass
class _Group:
    """The samples of one prompt, and its place: round of drawing, then place in the global batch."""

    place: tuple[int, int]
    samples: list[Experience]


@dataclass(kw_only=True, eq=False, repr=False)
class ExperienceMaker:
    """Makes the experience of one rollout step on this rank; the ranks call it together.

    :param needs_old_logprobs: compute the policy's logprobs before training. Not needed with a single
        optimizer step per rollout, which sees the same weights.
    :param trajectories: texts to keep of each draw, for the log.
    """

    strategy: StrategyBase
    actor: torch.nn.Module
    critic: torch.nn.Module | None
    initial_model: torch.nn.Module | None
    tokenizer: Any
    processor: Any = None
    prompt_max_len: int
    kl_controller: FixedKLController
    grader: Grader
    sampling: SamplingParams
    micro_batch_size: int
    needs_old_logprobs: bool
    trajectories: int = 0

    def __post_init__(self) -> None:
        self.config = config = self.strategy.config
        self.has_engine_logprobs = True  # until an engine returns none
        self.moments = RunningMoments()
        self.shaping = RewardShaping(
            clip=config.reward_clip,
            running_norm=config.reward_running_norm,
            minus_mean=config.reward_running_norm_minus_mean,
            overlong=config.overlong_buffer,
            overlong_buffer_len=config.overlong_buffer_len,
            overlong_penalty_factor=config.overlong_buffer_penalty_factor,
            max_length=self.sampling.max_tokens,
        )

    @property
    def vllm_mp_group(self) -> Any:
        """The ranks that share an engine; None if each rank has its own."""
        return self.strategy.engine_mp_group

    @property
    def samples_together(self) -> int:
        """How many neighbouring samples share a prompt, if the actor makes use of it."""
        return self.sampling.n if getattr(unwrap(self.actor), "shares_prompts", False) else 1

    @property
    def token_fields(self) -> tuple[str, ...]:
        """Per-token values that every sample of this run has."""
        config = self.config
        wanted = {
            "advantages": True,
            "engine_logprobs": self.has_engine_logprobs,
            "old_logprobs": self._needs_policy,
            "reference_logprobs": self.initial_model is not None,
            "entropies": config.high_entropy_token_ratio > 0,
            "values": self.critic is not None,
            "returns": self.critic is not None,
        }
        return tuple(name for name, there in wanted.items() if there)

    @property
    def _needs_policy(self) -> bool:
        """Whether the actor computes logprobs of the samples before it is trained on them."""
        kl_in_reward = self.initial_model is not None and not self.config.use_kl_loss
        return self.needs_old_logprobs or kl_in_reward or self.config.high_entropy_token_ratio > 0

    # ---- text to ids ------------------------------------------------------------------------------------------------
    def tokenize_fn(
        self, texts: str | Sequence[str], max_length: int, padding: bool = True, device: Any = None
    ) -> dict[str, Any]:
        """Token ids of prompts, truncated at the front to ``max_length``, which keeps the question at the end.

        :param padding: False: lists of ids. True: tensors ``[B, T]``, padded on the tokenizer's side, on ``device``.
        :return: ``input_ids`` and ``attention_mask``.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            options: dict[str, Any] = {"padding": True, "return_tensors": "pt"} if padding else {}
            encoded = self.tokenizer(texts, max_length=max_length, truncation=True, add_special_tokens=False, **options)
        finally:
            self.tokenizer.truncation_side = side
        names = ("input_ids", "attention_mask")
        if not padding:
            return {name: encoded[name] for name in names}
        return {name: encoded[name].to(device if device is not None else self.strategy.device) for name in names}

    # ---- the step ---------------------------------------------------------------------------------------------------
    def make_experience_list(self, stream: PromptStream, step: int) -> Rollout | None:
        """One step's samples, or None if the stream has ended. A collective."""
        rollout = Rollout([], {})
        groups = self._collect(stream, step, rollout)
        # Only now: sleep level 2 discards the weights, which another draw needs.
        self.strategy.maybe_sleep_inference_engine()
        if groups is None:
            return None
        begun = time.monotonic()
        self._number(groups, rollout)
        batches = list(self._microbatches(rollout))
        with evaluating(self.actor, self.critic):
            self._look(rollout, batches)
        self._shape(rollout)
        self.compute_advantages(rollout)
        rollout.seconds["experience"] = time.monotonic() - begun
        return rollout

    def _collect(self, stream: PromptStream, step: int, rollout: Rollout) -> list[_Group] | None:
        """Groups of this rank: one draw, or with dynamic sampling as many as needed."""
        config, kept = self.config, []
        rounds = config.dynamic_sampling_max_rounds if config.dynamic_sampling else 1
        wanted = 0
        for round_ in range(rounds):
            prompts = stream.draw()
            if prompts is None:
                if round_ == 0:
                    return None
                break
            wanted = wanted or self.strategy.reduce_over_data(len(prompts), "sum") if config.dynamic_sampling else 0
            groups = self._draw_groups(prompts, step, round_, rollout)
            if not config.dynamic_sampling:
                return groups
            mixed = [group for group in groups if len({sample.reward for sample in group.samples}) > 1]
            kept += mixed
            counts = self.strategy.reduce_over_data({"kept": len(kept), "dropped": len(groups) - len(mixed)}, "sum")
            rollout.groups_dropped += counts["dropped"]
            if counts["kept"] >= wanted:
                break
        places = sorted(place for part in self.strategy.gather_over_data([g.place for g in kept]) for place in part)
        if len(places) < wanted:
            self.strategy.print(
                f"step {step + 1}: dynamic sampling found {len(places)} of {wanted} prompts with mixed rewards in "
                f"{rounds} rounds; training on those"
            )
        chosen = set(places[:wanted])
        return [group for group in kept if group.place in chosen]

    def _draw_groups(self, prompts: Sequence[Any], step: int, round_: int, rollout: Rollout) -> list[_Group]:
        begun, sampling = time.monotonic(), self.sampling
        if round_:  # a prompt may come again in the same step, where an episode ends; the same samples may not
            seed = self.config.seed if sampling.seed is None else sampling.seed
            sampling = replace(sampling, seed=sample_seed(seed, step, round_, 0))
        outputs = self.generate(prompts, sampling, step)
        generated = time.monotonic()
        n = self.sampling.n
        rollout.generated_tokens += sum(len(output.output_token_ids) for output in outputs)
        samples = [self.to_sample(output, prompts[i // n]) for i, output in enumerate(outputs)]
        graded = self.grader(prompts, samples, n, step, trajectories=self.trajectories)
        for sample, reward in zip(samples, graded.rewards, strict=True):
            sample.reward = reward
        rollout.seconds["generate"] += generated - begun
        rollout.seconds["reward"] += time.monotonic() - generated
        measured = {name: (value, len(samples)) for name, value in graded.metrics.items()}
        rollout.metrics = sums_and_counts([rollout.metrics, measured])
        rollout.trajectories += graded.trajectories
        ranks, rank = self.strategy.data_parallel_size, self.strategy.data_parallel_rank
        return [_Group((round_, i * ranks + rank), samples[i * n : (i + 1) * n]) for i in range(len(prompts))]

    def generate(self, prompts: Sequence[Any], sampling: SamplingParams, step: int) -> list[GenerationOutput]:
        """``sampling.n`` responses to each of this rank's prompts, one after the other. A collective.

        The engine stays awake.
        """
        token_ids = [prompt.prompt_token_ids for prompt in prompts]
        return self.strategy.gather_and_generate(
            sampling,
            all_prompt_token_ids=token_ids,
            sleep_engine=False,
            prompt_indices=[prompt.index for prompt in prompts],
            step=step,
        )

    def to_sample(self, output: GenerationOutput, prompt: Any) -> Experience:
        """A response as a sample, without its index yet."""
        # By way of numpy, which reads long lists several times as fast as torch.
        ids = numpy.array([*output.prompt_token_ids, *output.output_token_ids], dtype=numpy.int64)
        logprobs = None if output.logprobs is None else numpy.array(output.logprobs, dtype=numpy.float32)
        return Experience(
            index=-1,
            prompt_index=prompt.index,
            tokens=torch.from_numpy(ids),
            response_length=len(output.output_token_ids),
            finished=output.finish_reason == "stop",
            weight_version=output.weight_version,
            engine_logprobs=None if logprobs is None else torch.from_numpy(logprobs),
        )

    def _number(self, groups: Sequence[_Group], rollout: Rollout) -> None:
        """Give every sample its global index, and send the records of all samples to all ranks."""
        rank = self.strategy.data_parallel_rank
        mine = [(group.place, [SampleRecord.of(sample, rank) for sample in group.samples]) for group in groups]
        told = all(s.engine_logprobs is not None for group in groups for s in group.samples)
        parts = self.strategy.gather_over_data((mine, told))
        self.has_engine_logprobs = all(told for _, told in parts)
        if not self.has_engine_logprobs:
            for group in groups:
                for sample in group.samples:
                    sample.engine_logprobs = None
        everyone = sorted(item for part, _ in parts for item in part)
        position = {place: number for number, (place, _) in enumerate(everyone)}
        n = self.sampling.n
        for place, records in everyone:
            for k, record in enumerate(records):
                rollout.records[position[place] * n + k] = record
        for group in groups:
            for k, sample in enumerate(group.samples):
                sample.index = position[group.place] * n + k
                rollout.samples.append(sample)
        rollout.samples.sort(key=lambda sample: sample.index)

    # ---- the models' view -------------------------------------------------------------------------------------------
    def _microbatches(self, rollout: Rollout) -> Iterator[list[Experience]]:
        """This rank's samples in micro-batches of similar length; as many as on the rank with the most."""
        config, samples = self.config, {sample.index: sample for sample in rollout.samples}
        cut = cut_microbatches(
            sorted(rollout.records),
            {index: record.owner for index, record in rollout.records.items()},
            {index: record.length for index, record in rollout.records.items()},
            world_size=self.strategy.data_parallel_size,
            size=self.micro_batch_size,
            max_tokens=config.max_tokens_per_micro_batch,
            packed=config.packing_samples,
            n_samples=self.samples_together,
        )
        for batch in cut[self.strategy.data_parallel_rank]:
            yield [samples[index] for index in batch.indices]

    @torch.no_grad()
    def _look(self, rollout: Rollout, batches: Sequence[list[Experience]]) -> None:
        """Fill in logprobs of actor and reference and the critic's values, as far as the algorithm needs them."""
        policy, temperature = self._needs_policy, self.sampling.temperature
        entropies = self.config.high_entropy_token_ratio > 0
        if not (policy or self.initial_model is not None or self.critic is not None):
            return
        for samples in batches:
            batch = make_batch(samples, self.tokenizer.pad_token_id or 0, self.strategy.device)
            if policy:
                statistics = token_statistics(self.actor, batch, temperature, entropy=entropies)
                self._store(samples, batch, "old_logprobs", statistics.logprobs)
                if statistics.entropies is not None:
                    self._store(samples, batch, "entropies", statistics.entropies)
            if self.initial_model is not None:
                statistics = token_statistics(self.initial_model, batch, temperature)
                self._store(samples, batch, "reference_logprobs", statistics.logprobs)
            if self.critic is not None:
                self._store(samples, batch, "values", token_values(self.critic, batch))

    @staticmethod
    def _store(samples: Sequence[Experience], batch: ExperienceBatch, name: str, values: Tensor) -> None:
        if samples:
            for sample, row in zip(samples, split_rows(values, batch.mask), strict=True):
                setattr(sample, name, row)

    # ---- rewards to advantages --------------------------------------------------------------------------------------
    def _sum_over_ranks(self, vector: Tensor) -> Tensor:
        return self.strategy.reduce_over_data(vector, "sum")

    def _shape(self, rollout: Rollout) -> None:
        rewards = torch.tensor([sample.reward for sample in rollout.samples], dtype=torch.float32)
        lengths = torch.tensor([sample.response_length for sample in rollout.samples], dtype=torch.float32)
        shaped = self.shaping.apply(rewards, lengths, self.moments, self._sum_over_ranks)
        for sample, value in zip(rollout.samples, shaped.tolist(), strict=True):
            sample.shaped_reward = value

    def compute_advantages(self, rollout: Rollout) -> None:
        """Give each of this rank's samples its ``advantages`` ``[response_length]``, from ``shaped_reward``; with a
        critic its ``returns`` too. Groups of ``sampling.n`` neighbours share a prompt. A collective.
        """
        config, samples = self.config, rollout.samples
        shaped = torch.tensor([sample.shaped_reward for sample in samples], dtype=torch.float32)
        scores = group_scores(
            shaped.reshape(len(samples) // self.sampling.n, self.sampling.n),
            config.advantage_estimator,
            self._sum_over_ranks,
        ).flatten()
        batch = make_batch(samples, 0, torch.device("cpu"))
        mask = batch.mask
        if not samples:  # a rank without samples still takes part in the collectives below
            scores = torch.zeros(1)
        kl = None
        if self.initial_model is not None and not config.use_kl_loss:
            kl = approximate_kl(batch.old_logprobs, batch.reference_logprobs, config.kl_estimator_name)
        spread = token_rewards(scores, mask, kl, self.kl_controller.value)
        if config.advantage_estimator == "gae":
            advantages, returns = gae(spread, batch.values, mask, config.gamma, config.lambd)
        else:
            advantages = discounted_returns(spread, mask, config.gamma)
            returns = advantages
        if config.advantages_norm:
            advantages = whiten(advantages, mask, self._sum_over_ranks)
        if config.advantage_clip > 0:
            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        self._store(samples, batch, "advantages", advantages)
        if self.critic is not None:
            self._store(samples, batch, "returns", returns)
