"""The trainer: roll out, grade, train, sync, in a loop that every rank runs.

``fit`` is the loop. ``ppo_train`` trains on the replay buffer and may be overridden; the loop then syncs the weights to
the engine, unless the override has done so.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.models.lora import WithoutAdapters, has_adapters
from lightrft.rewards import CheckedReward, CombinedReward, build_reward
from lightrft.strategy.checkpoint_folders import whole_checkpoints
from lightrft.strategy.errors import LightRFTError
from lightrft.strategy.hub_layout import unwrap
from lightrft.strategy.sampling import SamplingParams

from .evaluation import EvaluationResult, evaluate
from .experience_maker import ExperienceMaker, Rollout, sums_and_counts
from .grading import Grader
from .interruption import Interruption
from .kl_controller import make_kl_controller
from .losses import PolicyObjective
from .metrics import METRICS_FILE, STEP_KEYS, JsonlSink, MetricSink, make_sinks, read_metrics
from .minibatches import balance, optimizer_steps
from .plots import plot_curves
from .policy_update import PolicyUpdater
from .progress import HELD_OUT, Progress, describe, make_progress
from .prompt_stream import PromptStream
from .replay_buffer import OptimizerBatch, ReplayBuffer
from .run_state import RunState, keeping_settings

if TYPE_CHECKING:
    from lightrft.strategy import StrategyBase

logger = logging.getLogger("lightrft")

# generate_kwargs by Hugging Face's names that have no meaning here, and what to do instead.
UNSUPPORTED = {
    "do_sample": "drop it",
    "max_length": "use max_new_tokens",
    "pad_token_id": "drop it",
    "eos_token_id": "use stop_token_ids",
    "num_return_sequences": "use n_samples_per_prompt",
}

CHECKPOINTS, PLOTS, TRAJECTORIES = "checkpoints", "plots", "trajectories"


class DriftError(LightRFTError, RuntimeError):
    """The logprobs of engine and trainer differ by more than ``--max_logprob_drift``."""


class SPMDPPOTrainer:
    """Trains an actor by reinforcement learning with any LightRFT strategy and engine.

    Whatever is not given comes from ``strategy.config``. The strategy must have prepared the models, for example with
    ``strategy.prepare_models_and_optimizers``, and set up an engine. An algorithm of your own is a subclass with
    another ``experience_maker_class`` (advantages) or ``updater_class`` (losses).

    :param actor: the policy (:class:`lightrft.models.ActorLanguage` or anything that a strategy prepared from it).
    :param critic: needed with ``advantage_estimator="gae"``, else None.
    :param reward_model: a reward model, or the result of ``strategy.setup_reward_engine``; a list of them, or None.
    :param initial_model: the reference for the KL; None if ``init_kl_coef`` is 0, and for an actor with LoRA
        adapters, which is its own reference without them.
    :param ema_model: a moving average of the actor, or None.
    :param tokenizer: of the actor; ``processor`` for vision-language models.
    :param reward_fn: grades responses: ``reward_fn(prompts, responses, labels, **extras)`` returns one number for each.
        None: ``--reward`` and ``--remote_rm_url``. The scores of reward models are added.
    :param output_dir: folder for checkpoints, metrics and plots; None: ``--output_dir``.
    :param generate_kwargs: sampling settings by Hugging Face's or vLLM's names; they override the configuration.
    :raises ValueError: settings that cannot work together.
    """

    multimodal = False
    experience_maker_class: ClassVar[type[ExperienceMaker]] = ExperienceMaker
    updater_class: ClassVar[type[PolicyUpdater]] = PolicyUpdater

    def __init__(
        self,
        strategy: StrategyBase,
        actor: nn.Module,
        critic: nn.Module | None,
        reward_model: Any,
        initial_model: nn.Module | None,
        ema_model: nn.Module | None,
        actor_optim: Optimizer,
        critic_optim: Optimizer | None,
        actor_scheduler: Any,
        critic_scheduler: Any,
        ema_beta: float | None = None,
        init_kl_coef: float | None = None,
        kl_target: float | None = None,
        kl_horizon: int | None = None,
        micro_train_batch_size: int | None = None,
        eps_clip: float | None = None,
        value_clip: float | None = None,
        micro_rollout_batch_size: int | None = None,
        max_epochs: int | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        prompt_max_len: int | None = None,
        remote_rm_url: str | None = None,
        reward_fn: Any = None,
        loss_agg_mode: Any = None,
        use_gspo: bool | None = None,
        output_dir: str | Path | None = None,
        **generate_kwargs: Any,
    ) -> None:
        config = strategy.config

        def chosen(value: Any, name: str) -> Any:
            return getattr(config, name) if value is None else value

        self.strategy, self.args, self.config = strategy, strategy.args, config
        self.actor, self.critic, self.reward_model = actor, critic, reward_model
        self.ema_model = ema_model
        self.initial_model: Any = initial_model  # or an object that is called in the same way
        self.actor_optim, self.critic_optim = actor_optim, critic_optim
        self.actor_scheduler, self.critic_scheduler = actor_scheduler, critic_scheduler
        self.tokenizer, self.processor = tokenizer, processor
        self.ema_beta = chosen(ema_beta, "ema_beta")
        self.eps_clip = chosen(eps_clip, "eps_clip")
        self.value_clip = chosen(value_clip, "value_clip")
        self.micro_train_batch_size = chosen(micro_train_batch_size, "micro_train_batch_size")
        self.micro_rollout_batch_size = chosen(micro_rollout_batch_size, "micro_rollout_batch_size")
        self.max_epochs = chosen(max_epochs, "max_epochs")
        self.prompt_max_len = chosen(prompt_max_len, "prompt_max_len")
        self.loss_agg_mode = chosen(loss_agg_mode, "loss_agg_mode")
        gspo = chosen(use_gspo, "use_gspo")
        self.objective: PolicyObjective = "gspo" if gspo else "cpgd" if config.use_cpg_loss else "ppo"
        self.kl_ctl = make_kl_controller(
            chosen(init_kl_coef, "init_kl_coef"), chosen(kl_target, "kl_target"), chosen(kl_horizon, "kl_horizon")
        )
        self.output_dir = Path(config.output_dir if output_dir is None else output_dir)
        self.log_dir = Path(config.log_dir) if config.log_dir else self.output_dir
        if initial_model is None and self.kl_ctl.value and has_adapters(actor):
            self.initial_model = WithoutAdapters(actor)
        self.sampling = sampling_from(config, generate_kwargs)
        if problems := self._problems():
            raise ValueError("; ".join(problems))
        self.grader = self._make_grader(reward_fn, remote_rm_url)
        self.replay_buffer = ReplayBuffer()
        self.state = RunState()
        self.experience_maker = self.make_experience_maker()
        self.updater = self.updater_class(
            strategy=strategy,
            actor=actor,
            actor_optim=actor_optim,
            actor_scheduler=actor_scheduler,
            critic=critic,
            critic_optim=critic_optim,
            critic_scheduler=critic_scheduler,
            ema_model=ema_model,
            ema_beta=self.ema_beta,
            pad_token_id=tokenizer.pad_token_id or 0,
            objective=self.objective,
            loss_agg_mode=self.loss_agg_mode,
            eps_clip=self.eps_clip,
            value_clip=self.value_clip,
            kl_controller=self.kl_ctl,
            sampling=self.sampling,
        )
        self._stopping = False
        self._save_wanted: Callable[[], bool] = lambda: False
        self.last_evaluation: EvaluationResult | None = None

    def _make_grader(self, reward_fn: Any, remote_rm_url: str | None) -> Grader:
        """Rewards: ``reward_fn``, the reward models, or else what ``--reward`` and ``--remote_rm_url`` name."""
        config, rewards = self.config, []
        spec, urls, timeout = None, remote_rm_url, config.reward_timeout
        if reward_fn is None:
            spec, urls = config.reward, config.remote_rm_url if urls is None else urls
        elif isinstance(reward_fn, (CheckedReward, CombinedReward)):
            rewards.append(reward_fn)
        else:
            name = getattr(reward_fn, "__name__", "reward_fn")
            rewards.append(CheckedReward(reward_fn, name=name, timeout=timeout))
        if spec or urls:
            rewards.append(build_reward(spec, remote_urls=urls, timeout=timeout))
        models = self.reward_model if isinstance(self.reward_model, (list, tuple)) else [self.reward_model]
        return Grader(
            self.strategy,
            self.tokenizer,
            rewards,
            models=[model for model in models if model is not None],
            micro_batch_size=self.micro_rollout_batch_size,
        )

    def make_experience_maker(self) -> ExperienceMaker:
        """The maker of experience; override it to use another."""
        return self.experience_maker_class(
            strategy=self.strategy,
            actor=self.actor,
            critic=self.critic,
            initial_model=self.initial_model,
            tokenizer=self.tokenizer,
            processor=self.processor,
            prompt_max_len=self.prompt_max_len,
            kl_controller=self.kl_ctl,
            grader=self.grader,
            sampling=self.sampling,
            micro_batch_size=self.micro_rollout_batch_size,
            needs_old_logprobs=self.optimizer_steps_per_rollout > 1,
            trajectories=self.config.num_trajectories_to_save if self.config.save_trajectories else 0,
        )

    def _problems(self) -> list[str]:
        """Refuse missing arguments of the constructor."""
        config, problems = self.config, []
        if config.advantage_estimator == "gae" and self.critic is None:
            problems.append("--advantage_estimator gae needs a critic; pass critic=... and its optimizer")
        if self.critic is not None and self.critic_optim is None:
            problems.append("a critic was given without critic_optim; make one with strategy.create_optimizer(critic)")
        if self.initial_model is None and self.kl_ctl.value:
            problems.append(
                f"init_kl_coef is {self.kl_ctl.value} but there is no initial_model; pass one, or set init_kl_coef=0"
            )
        if self.sampling.greedy:
            problems.append("temperature=0: greedy answers come from no distribution to train on; choose one above 0")
        if config.overlong_buffer and config.overlong_buffer_len >= self.sampling.max_tokens:
            problems.append(
                f"--overlong_buffer_len {config.overlong_buffer_len}: must be below the {self.sampling.max_tokens} "
                "tokens of a response, or each is penalized from its first token; lower it, or raise --generate_max_len"
            )
        for flag in ("importance_sampling_cap", "max_logprob_drift"):
            if getattr(config, flag) and not self.sampling.full_support:
                problems.append(
                    f"--{flag}: compares full distributions; leave top_p, top_k and min_p at their defaults"
                )
        policy, reference = "Actor(...)", "Actor(...) of initial_model"
        for name, model in ((policy, self.actor), ("Critic(...)", self.critic), (reference, self.initial_model)):
            module = None if model is None else unwrap(model)
            if module is None or (name == reference and module is unwrap(self.actor)):  # checked already
                continue
            if config.fused_linear_logprob and name in (policy, reference):
                made_with = getattr(module, "chunk_size", None)
                if not getattr(module, "fused_linear_logprob", False):
                    problems.append(f"--fused_linear_logprob: pass fused_linear_logprob=True to {name} as well")
                # The default leaves the script's own value.
                elif config.chunk_size not in (type(config).chunk_size, made_with):
                    problems.append(
                        f"--chunk_size {config.chunk_size}: the model was made with {made_with}; pass "
                        f"chunk_size={config.chunk_size} to {name} as well"
                    )
            if config.packing_samples and not getattr(module, "packing_samples", False):
                problems.append(f"--packing_samples: pass packing_samples=True to {name} as well")
            if config.sp_size > 1 and getattr(module, "sequence_ranks", None) is None:
                problems.append(
                    f"--sp_size {config.sp_size}: pass sequence_group=strategy.sequence_group to {name} as well"
                )
        if self.tokenizer is None:
            problems.append("no tokenizer was given; pass tokenizer=...")
        return problems

    # ---- what the documents' examples read --------------------------------------------------------------------------
    @property
    def vllm_mp_group(self) -> Any:
        """The ranks that share an engine; None if each rank has its own."""
        return self.strategy.engine_mp_group

    @property
    def vllm_engine(self) -> Any:
        """This rank's engine."""
        return self.strategy.inference_engine

    def tokenize_fn(
        self, texts: str | Sequence[str], max_length: int, padding: bool = True, device: Any = None
    ) -> dict[str, Any]:
        """See :meth:`ExperienceMaker.tokenize_fn`."""
        return self.experience_maker.tokenize_fn(texts, max_length, padding, device)

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer steps on one full rollout buffer."""
        samples = self.config.rollout_batch_size * self.sampling.n
        return self.max_epochs * optimizer_steps(samples, self.config.train_batch_size)

    # ---- the loop ---------------------------------------------------------------------------------------------------
    def fit(
        self,
        args: Any = None,
        prompts_dataloader: Any = None,
        pretrain_dataloader: Any = None,
        consumed_samples: int = 0,
        num_update_steps_per_episodes: int | None = None,
        *,
        eval_prompts: Sequence[Any] = (),
        resume: bool | None = None,
        interruption: Interruption | None = None,
    ) -> RunState:
        """Train until all steps are done or the run is interrupted. Every rank calls.

        :param args: kept for older scripts; the settings are the strategy's.
        :param prompts_dataloader: lists of prompts, this rank's share of each rollout batch, from
            ``strategy.setup_dataloader``.
        :param consumed_samples: prompts, over all ranks, that earlier runs have used; a checkpoint's position overrides
            it.
        :param eval_prompts: held-out prompts, all of them on every rank.
        :param resume: continue from the last complete checkpoint; default ``--resume``.
        :raises DriftError: the engine drifted further than allowed.
        """
        if pretrain_dataloader is not None:
            raise ValueError("fit: pretrain_dataloader: a supervised loss cannot be mixed in; pass None")
        config = self.config
        stream = PromptStream(prompts_dataloader, episodes=config.num_episodes, batch_size=config.rollout_batch_size)
        per_episode = num_update_steps_per_episodes or max(1, len(stream))
        total = min(config.max_steps or 10**9, per_episode * config.num_episodes)
        if consumed_samples:
            done = consumed_samples // config.rollout_batch_size
            stream.load_state_dict(
                {
                    "episode": done // per_episode,
                    "consumed_samples": done % per_episode * config.rollout_batch_size,
                }
            )
        if config.resume if resume is None else resume:
            self.load_state(stream)
        self._stopping = False
        self._save_wanted = (lambda: interruption.asked) if interruption is not None else (lambda: False)
        sinks = self._open_sinks()
        progress = make_progress(total, done=self.state.step, show=self.strategy.is_rank_0())
        try:
            self.strategy.update_engine_weights(self.actor)
            if self.state.training:
                self.strategy.maybe_sleep_inference_engine()
            if self.state.step == 0 and not self.state.training:
                self._log_evaluation(self._evaluate(eval_prompts), sinks)
            with progress:
                self._run_steps(stream, total, eval_prompts, sinks, progress)
            if not self._stopping:
                self._log_evaluation(self._evaluate(eval_prompts), sinks)
            self.save_state(stream)
            self.strategy.finish_checkpoint()
        finally:
            for sink in sinks:
                sink.close()
        self._plot()
        return self.state

    @property
    def interrupted(self) -> bool:
        """Whether the last ``fit`` was interrupted."""
        return self._stopping

    def _run_steps(
        self,
        stream: PromptStream,
        total: int,
        eval_prompts: Sequence[Any],
        sinks: Sequence[MetricSink],
        progress: Progress,
    ) -> None:
        config = self.config
        while self.state.step < total and not self._interrupted():
            begun = time.monotonic()
            if not self.state.training and not self._roll_out(stream):
                break
            trained = time.monotonic()
            version = self.strategy.engine_host.weight_version
            status = self.ppo_train(self.state.step)
            if self._stopping:  # in the middle of the buffer; the checkpoint says where
                break
            self._sync_and_time(time.monotonic() - trained, version)
            self._finish_step(status, begun)
            values = self._step_values(status)
            if self._due(config.eval_steps, total):
                values |= self._evaluate(eval_prompts)
                if eval_prompts:
                    progress.note(f"step {self.state.step}/{total}  held out: {describe(values, HELD_OUT)}")
            for sink in sinks:
                sink.log(self.state.step, values)
            progress.advance(self.state.step, values)
            self._check_drift(values)
            if self._due(config.save_steps, total):
                self.save_state(stream)
            if self._due(config.plot_every, total):
                self._plot()

    def _due(self, every: int, total: int) -> bool:
        """Whether to do something periodic after this step; after the last one it is done anyway."""
        return every > 0 and self.state.step % every == 0 and self.state.step < total

    def _interrupted(self) -> bool:
        """Whether any rank was asked to stop. A collective: Ctrl-C reaches the ranks at different times."""
        if not self._stopping:
            self._stopping = bool(self.strategy.all_reduce(int(self._save_wanted()), "max"))
        return self._stopping

    # ---- one step ---------------------------------------------------------------------------------------------------
    def _roll_out(self, stream: PromptStream) -> bool:
        """Fill the buffer; False if there are no more prompts."""
        rollout = self.experience_maker.make_experience_list(stream, self.state.step)
        if rollout is None:
            return False
        expected = self.config.rollout_batch_size * self.sampling.n
        if len(rollout.records) > expected:
            raise ValueError(
                f"fit: prompts_dataloader gave {len(rollout.records) // self.sampling.n} prompts for a step, over all "
                f"ranks; --rollout_batch_size is {self.config.rollout_batch_size}, which decides where a resumed run "
                "goes on and whether old logprobs are needed: set it to what the loader gives"
            )
        self.replay_buffer.fill(rollout.samples, rollout.records)
        self.state.training, self.state.epoch, self.state.batch = True, 0, 0
        self.state.sums = {}
        self.state.stream = stream.state_dict()
        self.state.figures = self._rollout_figures(rollout)
        self._save_trajectories(rollout)
        return True

    def _rollout_figures(self, rollout: Rollout) -> dict[str, Any]:
        records = list(rollout.records.values())
        rewards = torch.tensor([record.reward for record in records], dtype=torch.float64)
        lengths = torch.tensor([float(record.response_length) for record in records], dtype=torch.float64)
        samples = rollout.samples
        summed = self.strategy.reduce_over_data(
            {"tokens": rollout.generated_tokens, "finished": sum(sample.finished for sample in samples)}, "sum"
        )
        seconds = self.strategy.all_reduce(rollout.seconds, "max")
        parts = sums_and_counts([part for (part,) in self.strategy.gather_over_data([rollout.metrics])])
        count = max(1, len(records))
        return {
            "reward_mean": float(rewards.mean()) if records else None,
            "reward_std": float(rewards.std(unbiased=False)) if records else None,
            "response_length_mean": float(lengths.mean()) if records else None,
            "response_length_max": float(lengths.max()) if records else None,
            "finished_share": summed["finished"] / count,
            "tokens_per_second": summed["tokens"] / max(seconds["generate"], 1e-9),
            "seconds_generate": seconds["generate"],
            "seconds_reward": seconds["reward"],
            "seconds_experience": seconds["experience"],
            "groups_dropped": rollout.groups_dropped,
            "sample_versions": dict(sorted(Counter(str(record.weight_version) for record in records).items())),
            **{f"reward/{name}": value / graded for name, (value, graded) in parts.items() if graded},
        }

    def ppo_train(self, global_steps: int = 0) -> dict[str, float]:
        """Train on the replay buffer: every epoch, every optimizer step that is not done yet.

        Stops early, between two optimizer steps, if the run is interrupted.

        :param global_steps: the rollout step, which decides how the buffer is shuffled.
        :return: means over the step: loss, kl, grad_norm, logprob_drift, clip_fraction, ...
        """
        state = self.state
        while state.epoch < self.max_epochs:
            plan = self._plan_epoch(global_steps, state.epoch)
            while state.batch < len(plan):
                if (state.epoch or state.batch) and self._interrupted():
                    return {}
                figures = self.training_step(plan[state.batch], global_steps)
                for name, value in figures.items():
                    peak = name.endswith("_max")
                    before = state.sums.get(name, 0.0)
                    state.sums[name] = max(before, value) if peak else before + value
                state.sums["batches"] = state.sums.get("batches", 0.0) + 1
                state.optimizer_steps += 1
                state.skipped_steps += int(figures.get("skipped", 0))
                state.batch += 1
            state.epoch, state.batch = state.epoch + 1, 0
        return self._status()

    def _plan_epoch(self, step: int, epoch: int) -> list[OptimizerBatch]:
        """The optimizer steps of one epoch. If samples are packed, or micro-batches formed by tokens, samples are first
        exchanged so that all ranks have about the same number of tokens in each step; a collective.
        """
        config, buffer = self.config, self.replay_buffer
        rank, ranks = self.strategy.data_parallel_rank, self.strategy.data_parallel_size
        steps = buffer.steps(
            n_samples=self.sampling.n, batch_size=config.train_batch_size, seed=config.seed, step=step, epoch=epoch
        )
        by_tokens = config.max_tokens_per_micro_batch is not None
        if ranks > 1 and (config.packing_samples or by_tokens):
            owners = balance(steps, buffer.lengths, ranks=ranks, equally_many=not by_tokens)
            buffer.exchange(owners, rank=rank, gather=self.strategy.gather_over_data)
        return buffer.plan(
            steps,
            micro_batch_size=self.micro_train_batch_size,
            rank=rank,
            ranks=ranks,
            max_tokens=config.max_tokens_per_micro_batch,
            packed=config.packing_samples,
            n_samples=self.experience_maker.samples_together,
        )

    def training_step(self, batch: OptimizerBatch, global_steps: int) -> dict[str, float]:
        """One optimizer step of the actor, and of the critic if there is one; returns its figures, the same on all
        ranks.
        """
        return self.updater.step(
            batch,
            self.replay_buffer,
            self.experience_maker.token_fields,
            train_actor=global_steps >= self.config.freezing_actor_steps,
        )

    def _status(self) -> dict[str, float]:
        """Means over the optimizer steps of this rollout step."""
        batches = max(1.0, self.state.sums.get("batches", 0.0))
        return {
            name: value if name == "skipped" or name.endswith("_max") else value / batches
            for name, value in self.state.sums.items()
            if name != "batches"
        }

    # ---- after training ---------------------------------------------------------------------------------------------
    def _sync_and_time(self, training: float, version: int) -> None:
        """Sync, unless an overridden ``ppo_train`` has done so, and note the seconds of both on the slowest rank.

        :param training: seconds in ``ppo_train``. :param version: the engine's weights before it.
        """
        host, figures = self.strategy.engine_host, self.state.figures
        synced = host.weight_version != version
        if not synced:
            self.strategy.update_engine_weights(self.actor)
        assert host.last_receipt is not None
        sync = host.last_receipt.seconds
        training -= sync if synced else 0.0
        seconds = {"seconds_train": figures.get("seconds_train", 0.0) + training, "seconds_sync": sync}
        figures.update(self.strategy.all_reduce(seconds, "max"))

    def _finish_step(self, status: dict[str, float], begun: float) -> None:
        state = self.state
        state.step += 1
        state.training, state.epoch, state.batch = False, 0, 0
        state.figures["seconds_total"] = time.monotonic() - begun
        if "kl" in status:
            self.kl_ctl.update(status["kl"], len(self.replay_buffer.records))
        self.replay_buffer.clear()

    def _step_values(self, status: dict[str, float]) -> dict[str, Any]:
        """A line of metrics.jsonl: always with the keys of :data:`lightrft.trainer.metrics.STEP_KEYS`."""
        absent = {**dict.fromkeys(STEP_KEYS[1:]), "seconds_sync": 0.0, "sample_versions": {}}  # log() adds the step
        return {
            **absent,
            **self.state.figures,
            **status,
            # Without a reference it is the KL of the update itself: how far training has moved the policy from the
            # one that generated the samples.
            "kl": status.get("kl", status.get("policy_kl")),
            "weight_version": self.strategy.engine_host.weight_version,
            "kl_coef": self.kl_ctl.value,
            "lr": self.actor_optim.param_groups[0]["lr"],
            "skipped_steps": self.state.skipped_steps,
        }

    def _check_drift(self, values: dict[str, Any]) -> None:
        limit, drift = self.config.max_logprob_drift, values.get("logprob_drift")
        if limit is not None and drift is not None and drift > limit:
            raise DriftError(
                f"step {self.state.step}: engine and trainer logprobs differ by {drift:.4g} on average, "
                f"--max_logprob_drift is {limit:g}; check that the engine has the trainer's dtype and weights, "
                "or correct the drift with --importance_sampling_cap 2"
            )

    # ---- evaluation -------------------------------------------------------------------------------------------------
    def evaluate(self, prompts: Sequence[Any]) -> EvaluationResult:
        """Greedy answers to held-out prompts, graded; every rank calls, with the same prompts."""
        return evaluate(self.experience_maker, self.grader, prompts, step=self.state.step)

    def _evaluate(self, prompts: Sequence[Any]) -> dict[str, float]:
        if not prompts:
            return {}
        result = self.evaluate(prompts)
        self.last_evaluation = result
        self.state.evaluation[str(self.state.step)] = {"accuracy": result.accuracy, "reward": result.reward}
        return {"eval_accuracy": result.accuracy, "eval_reward": result.reward}

    def _log_evaluation(self, figures: Mapping[str, float], sinks: Sequence[MetricSink]) -> None:
        """An evaluation before or after the steps belongs to no line of metrics.jsonl: it has its own file."""
        if not self.strategy.is_rank_0() or not self.state.evaluation:
            return
        path = self.output_dir / "evaluation.json"
        path.write_text(json.dumps(self.state.evaluation, indent=1), encoding="utf-8")
        for sink in sinks:
            if figures and not isinstance(sink, JsonlSink):
                sink.log(self.state.step, figures)

    # ---- files ------------------------------------------------------------------------------------------------------
    def _open_sinks(self) -> list[MetricSink]:
        if not self.strategy.is_rank_0():
            return []
        return make_sinks(self.config, self.output_dir, self.log_dir, first_step=self.state.step + 1)

    def _plot(self) -> None:
        if not self.strategy.is_rank_0():
            return
        held_out = [
            {"step": int(step), **{f"eval_{name}": value for name, value in figures.items()}}
            for step, figures in self.state.evaluation.items()
        ]
        plot_curves([*read_metrics(self.output_dir / METRICS_FILE), *held_out], self.log_dir / PLOTS)

    def _save_trajectories(self, rollout: Rollout) -> None:
        if not self.config.save_trajectories or not self.strategy.is_rank_0():
            return
        folder = self.log_dir / TRAJECTORIES
        folder.mkdir(parents=True, exist_ok=True)
        chosen = rollout.trajectories[: self.config.num_trajectories_to_save]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in chosen)
        (folder / f"step_{self.state.step + 1}.jsonl").write_text(text, encoding="utf-8")

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def _models(self) -> dict[str, nn.Module]:
        models = {"actor": self.actor, "critic": self.critic, "ema": self.ema_model}
        return {name: model for name, model in models.items() if model is not None}

    def save_state(self, stream: PromptStream | None = None) -> None:
        """Write a checkpoint of everything; between two optimizer steps, also in the middle of a rollout buffer."""
        state = self.state
        if stream is not None:
            state.stream = stream.state_dict()
        place = f"_epoch_{state.epoch}_batch_{state.batch}" if state.training else ""
        self.strategy.save_ckpt(
            self._models(),
            self.output_dir / CHECKPOINTS,
            tag=f"step_{state.step:06d}{place}",
            max_num=self.config.max_ckpt_num,
            max_mem=self.config.max_ckpt_mem,
            client_state={
                "step": state.step,
                "run": state.to_json(),
                "kl": self.kl_ctl.state_dict(),
                "moments": self.experience_maker.moments.state_dict(),
                "engine": self.strategy.engine_host.state_dict(),
                "sp_size": self.config.sp_size,
            },
            rank_state=self.replay_buffer.state_tensors() if state.training else {},
            tokenizer=self.processor or self.tokenizer,
            asynchronous=self.config.async_save and not self._stopping,
        )

    def load_state(self, stream: PromptStream) -> bool:
        """Load the last complete checkpoint; False if there is none yet, and the run starts from the beginning.

        :raises CheckpointError: there are checkpoints, and every one is damaged or another model's.
        """
        folder = self.output_dir / CHECKPOINTS
        if not self.strategy.all_gather_object(whole_checkpoints(folder))[0]:
            self.strategy.print(f"{folder}: no checkpoint yet; starting from the beginning")
            return False
        actor = keeping_settings(self.actor_optim, self.actor_scheduler)
        with actor, keeping_settings(self.critic_optim, self.critic_scheduler):
            loaded = self.strategy.load_ckpt(self._models(), folder)
        saved = loaded.client_state
        self.state = RunState.from_json(saved["run"])
        self.kl_ctl.load_state_dict(saved["kl"])
        self.experience_maker.moments.load_state_dict(saved["moments"])
        # The sync at the start of fit counts as the one after the last step.
        version = dict(saved["engine"])
        version["weight_version"] = max(0, version["weight_version"] - 1)
        self.strategy.engine_host.load_state_dict(version)
        stream.load_state_dict(self.state.stream)
        if stream.digest is not None and self.state.stream.get("prompts", stream.digest) != stream.digest:
            self.strategy.print(
                "warning: --prompt_data: the prompts are not those of the checkpoint; the run goes on at the same "
                "place among the new ones, some of which it may have seen"
            )
        if self.state.training:
            # Ranks that shared a sequence saved the same samples.
            states = loaded.rank_states[:: saved.get("sp_size", 1)]
            self.experience_maker.has_engine_logprobs = all(
                bool(state["has.engine_logprobs"].all()) for state in states
            )
            self.replay_buffer = ReplayBuffer.restore(
                states,
                n_samples=self.sampling.n,
                rank=self.strategy.data_parallel_rank,
                ranks=self.strategy.data_parallel_size,
            )
        where = f"step {self.state.step}" + (" (in the middle of a rollout buffer)" if self.state.training else "")
        self.strategy.print(f"resumed from {loaded.path} at {where}")
        return True


def sampling_from(config: Any, generate_kwargs: dict[str, Any]) -> SamplingParams:
    """Sampling settings: the configuration's, overridden by ``generate_kwargs`` (Hugging Face's or vLLM's names).

    :raises ValueError: a name that is not supported here.
    """
    for name, cure in UNSUPPORTED.items():
        if name in generate_kwargs:
            raise ValueError(f"generate_kwargs: {name} is not supported here; {cure}")
    named = {
        "n": config.n_samples_per_prompt,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "max_tokens": config.generate_max_len,
        "seed": config.seed,
    }
    return SamplingParams.coerce({**named, **generate_kwargs})  # which also knows Hugging Face's names
