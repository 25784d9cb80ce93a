"""Every setting of a run, written once.

Each field of :class:`StrategyConfig` is at once a Python field, a flag of :func:`lightrft.utils.add_arguments`, a key
of a YAML file and a line of the reference page. Importing this module loads neither torch nor pydantic.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import config_checks
from .errors import ConfigError

T = TypeVar("T")


def option(default: T, help: str, *, group: str, rule: tuple[Callable[[T], bool], str] | None = None) -> T:
    """A field with its help text, its flag group and what makes a value right.

    :param rule: a predicate of the value, and the words that complete "must be ...".
    """
    metadata = {"help": help, "group": group, "rule": rule}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)


positive = (lambda value: value is None or value > 0, "above 0")
at_least_0 = (lambda value: value is None or value >= 0, "0 or more")
at_least_1 = (lambda value: value is None or value >= 1, "at least 1")
share = (lambda value: value is None or 0 <= value <= 1, "between 0 and 1")
above_0_share = (lambda value: value is None or 0 < value <= 1, "above 0 and at most 1")
every = (lambda value: value == -1 or value >= 1, "-1 (never) or a positive count")
a_seed = (lambda value: 0 <= value < 2**32, f"between 0 and {2**32 - 1}, which torch and numpy both take")
shares = (config_checks.are_shares, "positive numbers with commas between them, for example 0.7,0.3")

RUN, BACKEND, ENGINE = "run", "training backend", "inference engine"
MODEL, DATA, ROLLOUT = "models", "data", "rollout"
TRAIN, ALGORITHM, REWARD, OUTPUT = "optimization", "algorithm", "rewards", "output and logging"

# What an out-of-memory error is answered with.
LESS_MEMORY = (
    "--engine_mem_util, --engine_tp_size, --zero_stage, --fsdp_cpu_offload, --bf16, --micro_rollout_batch_size"
)


@dataclass(kw_only=True)
class StrategyConfig:
    """The typed settings of a run. Take parameters from here, not from a bare ``args``.

    Construction checks nothing and prints nothing; :meth:`checked` reports every fault at once.
    """

    # ---- run
    seed: int = option(42, "Seed of everything random in the run.", group=RUN, rule=a_seed)
    local_rank: int = option(
        -1,
        "This process's rank on its node; set by the launcher, LOCAL_RANK wins.",
        group=RUN,
        rule=(lambda v: v >= -1, "-1 (not given) or more"),
    )
    dist_timeout: float = option(
        600.0, "Seconds after which a late rank ends the run, with its name.", group=RUN, rule=positive
    )

    # ---- training backend
    strategy: str | None = option(None, "Training backend by its registered name; overrides --fsdp.", group=BACKEND)
    fsdp: bool = option(False, "Train with PyTorch FSDP2 instead of DeepSpeed.", group=BACKEND)
    zero_stage: int = option(
        2, "DeepSpeed ZeRO stage: 1, 2 or 3.", group=BACKEND, rule=(lambda v: v in (1, 2, 3), "1, 2 or 3")
    )
    bf16: bool = option(False, "Compute in bfloat16.", group=BACKEND)
    fp16: bool = option(False, "Compute in float16.", group=BACKEND)
    use_mp_opt: bool = option(
        False, "FSDP: keep parameters in 16 bit and the optimizer's master copy and moments in fp32.", group=BACKEND
    )
    fsdp_cpu_offload: bool = option(False, "FSDP: optimizer states and gradients live on the CPU.", group=BACKEND)
    adam_offload: bool = option(False, "Adam's states and its step live on the CPU.", group=BACKEND)
    zpg: int = option(
        1, "DeepSpeed ZeRO++: ranks of a secondary parameter shard (stage 3).", group=BACKEND, rule=at_least_1
    )
    overlap_comm: bool = option(False, "DeepSpeed: overlap gradient reduction with the backward pass.", group=BACKEND)
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, "DeepSpeed: dtype in which gradients accumulate.", group=BACKEND
    )
    sp_size: int = option(
        1,
        "Ranks that share one sequence.",
        group=BACKEND,
        rule=at_least_1,
    )
    meta_init: bool = option(False, "Build models on the meta device; each rank fills only its shard.", group=BACKEND)
    initial_model_shard_size: int | None = option(
        None, "Ranks over which the reference model is sharded; default: all.", group=BACKEND, rule=at_least_1
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", group=BACKEND
    )

    # ---- inference engine
    engine_type: str = option("vllm", "Rollout engine by its registered name: vllm, sglang or hf.", group=ENGINE)
    engine_tp_size: int = option(1, "Ranks over which the engine splits the model.", group=ENGINE, rule=at_least_1)
    engine_mem_util: float = option(
        0.5, "Share of the device's memory for the engine.", group=ENGINE, rule=above_0_share
    )
    enable_engine_sleep: bool = option(True, "Let the engine sleep while the trainer trains.", group=ENGINE)
    engine_sleep_level: int = option(
        1, "1: weights wait on the host; 2: they are dropped.", group=ENGINE, rule=(lambda v: v in (1, 2), "1 or 2")
    )
    max_model_len: int | None = option(
        None, "The engine's context in tokens; default: the model's.", group=ENGINE, rule=at_least_1
    )
    weight_bucket_mb: float = option(
        512.0, "Weights travel to the engine in buckets of this many MiB.", group=ENGINE, rule=positive
    )
    verify_weights: Literal["sampled", "full"] = option(
        "sampled", "What a weight sync compares: some elements of each tensor, or every one.", group=ENGINE
    )
    engine_timeout: float = option(1800.0, "Seconds that one engine call may take.", group=ENGINE, rule=positive)
    limit_mm_image_per_prompt: int = option(
        -1, "Most images a prompt; -1: no limit.", group=ENGINE, rule=(lambda v: v >= -1, "-1 or more")
    )
    rm_use_engine: bool = option(
        False, "Serve --reward_pretrain by the engine of --engine_type (vllm) instead of transformers.", group=ENGINE
    )
    rm_engine_cudagraph: bool = option(
        False, "Let the reward model's engine capture CUDA graphs; needs a GPU.", group=ENGINE
    )

    # ---- models
    pretrain: str | None = option(None, "The model to fine-tune: a folder or a hub name.", group=MODEL)
    critic_pretrain: str | None = option(
        None, "The critic's starting point (with --advantage_estimator gae).", group=MODEL
    )
    reward_pretrain: str | None = option(
        None, "A reward model: a folder or a hub name; commas join several.", group=MODEL
    )
    flash_attn: bool = option(False, "Use flash attention; refused where it is not installed.", group=MODEL)
    trust_remote_code: bool = option(False, "Run code that a hub model brings along.", group=MODEL)
    enable_ema: bool = option(False, "Keep an exponential moving average of the actor and save it too.", group=MODEL)
    ema_beta: float = option(0.992, "With --enable_ema: decay of the moving average.", group=MODEL, rule=share)
    mixed_mm_data: bool = option(
        False, "FSDP: batches mix prompts with and without images, unevenly over ranks.", group=MODEL
    )
    packing_samples: bool = option(False, "Pack the samples of a micro-batch into one row.", group=MODEL)
    fused_linear_logprob: bool = option(
        False,
        "Logprobs straight from hidden states, without all the logits at one time.",
        group=MODEL,
    )
    chunk_size: int = option(
        4096, "Most tokens whose logits --fused_linear_logprob holds at one time.", group=MODEL, rule=at_least_1
    )
    lora_rank: int = option(
        0, "Train LoRA adapters of this rank instead of the weights; 0: all weights.", group=MODEL, rule=at_least_0
    )
    lora_alpha: float = option(
        16.0, "With --lora_rank: adapters are scaled by this over the rank.", group=MODEL, rule=positive
    )
    lora_dropout: float = option(
        0.0,
        "With --lora_rank: dropout before the adapters while they train.",
        group=MODEL,
        rule=(lambda v: 0 <= v < 1, "0 or more and below 1"),
    )
    target_modules: str = option(
        "all-linear",
        "With --lora_rank: layers that get adapters: all-linear (but the output layer), or names joined by commas.",
        group=MODEL,
        rule=(lambda v: bool(v.strip(", ")), "all-linear or names of linear layers, for example q_proj,v_proj"),
    )

    # ---- data
    prompt_data: str | None = option(
        None, "Prompts: .jsonl, .parquet, a dataset's name, reasoning_gym:TASK; commas join several.", group=DATA
    )
    prompt_data_probs: str | None = option(None, "Shares of several --prompt_data.", group=DATA, rule=shares)
    prompt_split: str = option("train", "Split of --prompt_data.", group=DATA)
    eval_data: str | None = option(None, "Held-out prompts, in any form that --prompt_data takes.", group=DATA)
    eval_split: str = option("test", "Split of --eval_data.", group=DATA)
    eval_steps: int = option(-1, "Evaluate every so many steps; -1: only before and after.", group=DATA, rule=every)
    max_eval_samples: int = option(500, "Most held-out prompts.", group=DATA, rule=at_least_1)
    input_key: str = option("input", "Key of the prompt.", group=DATA)
    label_key: str = option("label", "Key of the right answer.", group=DATA)
    images_key: str = option("image", "Key of the images.", group=DATA)
    system_prompt: str | None = option(None, "With --apply_chat_template: its system message.", group=DATA)
    input_template: str | None = option(
        None,
        "Template of a prompt, with {} in place of the input.",
        group=DATA,
        rule=(lambda v: v is None or "{}" in v, "a text with {} where the input belongs"),
    )
    apply_chat_template: bool = option(False, "Apply the tokenizer's chat template.", group=DATA)
    max_samples: int = option(1_000_000, "Most prompts to read.", group=DATA, rule=at_least_1)
    prompt_max_len: int = option(1024, "Longest prompt in tokens.", group=DATA, rule=at_least_1)

    # ---- rollout
    rollout_batch_size: int = option(512, "Prompts a step, over all ranks.", group=ROLLOUT, rule=at_least_1)
    micro_rollout_batch_size: int = option(
        8, "Samples a forward pass while experience is made.", group=ROLLOUT, rule=at_least_1
    )
    n_samples_per_prompt: int = option(8, "Samples a prompt.", group=ROLLOUT, rule=at_least_1)
    generate_max_len: int = option(1024, "Longest response in tokens.", group=ROLLOUT, rule=at_least_1)
    temperature: float = option(1.0, "Sampling temperature.", group=ROLLOUT, rule=positive)
    top_p: float = option(
        1.0, "Sample from the smallest set of tokens with this probability.", group=ROLLOUT, rule=above_0_share
    )
    top_k: int = option(
        -1,
        "Sample from this many likeliest tokens.",
        group=ROLLOUT,
        rule=(lambda v: v >= -1, "-1 or 0 (all tokens), or a positive count"),
    )
    min_p: float = option(
        0.0, "Drop tokens below this share of the likeliest one's probability.", group=ROLLOUT, rule=share
    )
    dynamic_sampling: bool = option(
        False, "Redraw groups whose rewards are all equal (DAPO, arXiv:2503.14476).", group=ROLLOUT
    )
    dynamic_sampling_max_rounds: int = option(
        4, "With --dynamic_sampling: most redraws of one step.", group=ROLLOUT, rule=at_least_1
    )

    # ---- optimization
    train_batch_size: int = option(128, "Samples an optimizer step, over all ranks.", group=TRAIN, rule=at_least_1)
    micro_train_batch_size: int = option(
        1, "Samples a forward and backward pass on one rank.", group=TRAIN, rule=at_least_1
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Form micro-batches by tokens: as many samples as have at most this many; default: by their number.",
        group=TRAIN,
        rule=at_least_1,
    )
    max_norm: float = option(
        1.0, "Clip the global gradient norm to this; 0: no clipping.", group=TRAIN, rule=at_least_0
    )
    actor_learning_rate: float = option(1e-6, "Peak learning rate of the actor.", group=TRAIN, rule=at_least_0)
    critic_learning_rate: float = option(
        9e-6, "With --advantage_estimator gae: peak learning rate of the critic.", group=TRAIN, rule=at_least_0
    )
    adam_betas: tuple[float, float] = option(
        (0.9, 0.95),
        "Adam's two betas.",
        group=TRAIN,
        rule=(lambda v: all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
    )
    adam_eps: float = option(1e-8, "Adam's epsilon.", group=TRAIN, rule=positive)
    l2: float = option(0.0, "Weight decay, not applied to biases and norms.", group=TRAIN, rule=at_least_0)
    # transformers' others need more than a name and the number of steps
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "cosine",
        "cosine_with_min_lr",
        "cosine_with_restarts",
        "inverse_sqrt",
        "linear",
        "polynomial",
    ] = option("cosine_with_min_lr", "Learning-rate schedule, by transformers' name.", group=TRAIN)
    lr_warmup_ratio: float = option(0.03, "Share of the steps that warm up.", group=TRAIN, rule=share)
    num_episodes: int = option(1, "Passes over the prompts.", group=TRAIN, rule=at_least_1)
    max_epochs: int = option(1, "Passes over each rollout buffer.", group=TRAIN, rule=at_least_1)
    max_steps: int | None = option(
        None, "Most rollout steps; default: all prompts, --num_episodes times.", group=TRAIN, rule=at_least_1
    )
    freezing_actor_steps: int = option(
        -1, "Train only the critic for so many steps first.", group=TRAIN, rule=(lambda v: v >= -1, "-1 or more")
    )

    # ---- algorithm
    advantage_estimator: Literal["group_norm", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline", "gae"] = (
        option("group_norm", "How rewards become advantages; group_norm and grpo are one.", group=ALGORITHM)
    )
    gamma: float = option(1.0, "Discount of rewards.", group=ALGORITHM, rule=share)
    lambd: float = option(0.95, "With --advantage_estimator gae: its lambda.", group=ALGORITHM, rule=share)
    eps_clip: float = option(0.2, "Clip range of the policy ratio.", group=ALGORITHM, rule=positive)
    eps_clip_high: float | None = option(
        None, "Upper clip range; default: --eps_clip (DAPO's clip-higher).", group=ALGORITHM, rule=positive
    )
    value_clip: float = option(
        0.2, "With --advantage_estimator gae: clip range of the critic's values.", group=ALGORITHM, rule=positive
    )
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = option(
        "token-mean", "How token losses are averaged.", group=ALGORITHM
    )
    use_gspo: bool = option(
        False,
        "Sequence-level ratio (GSPO, arXiv:2507.18071, which clips at --eps_clip 3e-4 --eps_clip_high 4e-4).",
        group=ALGORITHM,
    )
    use_cpg_loss: bool = option(False, "Clipped policy gradient with drift (CPGD, arXiv:2505.12504).", group=ALGORITHM)
    policy_drift_coef: float = option(
        0.0,
        "With --use_cpg_loss: weight of the drift from the policy that wrote the samples.",
        group=ALGORITHM,
        rule=at_least_0,
    )
    policy_drift_clip_eps: float = option(
        0.2,
        "With --policy_drift_coef: how far above 1 a ratio still adds to the drift's pull.",
        group=ALGORITHM,
        rule=positive,
    )
    init_kl_coef: float = option(
        0.01, "Weight of the KL to the reference model; 0 loads no reference model.", group=ALGORITHM, rule=at_least_0
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = option(
        None,
        "Estimator of the KL; default: k1 in the reward, k3 in the loss. k2 and k3 in the reward, and k1 in the loss, "
        "hardly pull toward the reference.",
        group=ALGORITHM,
    )
    use_kl_loss: bool = option(False, "Add the KL to the loss instead of the reward.", group=ALGORITHM)
    kl_target: float | None = option(
        None, "Adapt the KL's weight toward this KL, in nats a token.", group=ALGORITHM, rule=positive
    )
    kl_horizon: int = option(
        10000, "With --kl_target: samples over which the KL's weight adapts.", group=ALGORITHM, rule=at_least_1
    )
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.", group=ALGORITHM, rule=at_least_0)
    high_entropy_token_ratio: float = option(
        0.0,
        "Train on this share of tokens with the highest entropy; 0: on all (arXiv:2506.01939).",
        group=ALGORITHM,
        rule=share,
    )
    advantages_norm: bool = option(False, "Whiten advantages over the whole batch.", group=ALGORITHM)
    advantage_clip: float = option(
        0.0, "Clip advantages to plus and minus this; 0: no clipping.", group=ALGORITHM, rule=at_least_0
    )
    importance_sampling_cap: float = option(
        0.0,
        "Correct engine/trainer drift by importance weights truncated at this; 0: only measure.",
        group=ALGORITHM,
        rule=at_least_0,
    )
    max_logprob_drift: float | None = option(
        None, "Stop when the mean engine/trainer logprob difference exceeds this.", group=ALGORITHM, rule=positive
    )

    # ---- rewards
    reward: str | None = option(
        None, "Rule rewards, or module:function; commas join several, name=weight weighs them.", group=REWARD
    )
    remote_rm_url: str | None = option(
        None, "URL of a reward server that speaks JSON; commas join several.", group=REWARD
    )
    reward_timeout: float = option(60.0, "Seconds that one reward call may take.", group=REWARD, rule=positive)
    reward_clip: float = option(
        0.0, "Clip rewards to plus and minus this; 0: no clipping.", group=REWARD, rule=at_least_0
    )
    reward_running_norm: bool = option(False, "Divide rewards by their running standard deviation.", group=REWARD)
    reward_running_norm_minus_mean: bool = option(False, "Subtract the running mean as well.", group=REWARD)
    overlong_buffer: bool = option(False, "Penalize responses near the length limit (DAPO).", group=REWARD)
    overlong_buffer_len: int = option(
        1024,
        "With --overlong_buffer: tokens before the limit over which the penalty grows.",
        group=REWARD,
        rule=at_least_1,
    )
    overlong_buffer_penalty_factor: float = option(
        1.0, "With --overlong_buffer: largest penalty.", group=REWARD, rule=at_least_0
    )

    # ---- output and logging
    output_dir: str = option(
        "lightrft_runs/latest", "Folder of the run: config, metrics, plots, checkpoints, model.", group=OUTPUT
    )
    log_dir: str | None = option(None, "Folder of plots and logs; default: --output_dir.", group=OUTPUT)
    plot_every: int = option(10, "Plot response lengths every so many steps; -1: never.", group=OUTPUT, rule=every)
    save_steps: int = option(
        -1, "Checkpoint every so many steps; -1: only at the end and on Ctrl-C.", group=OUTPUT, rule=every
    )
    max_ckpt_num: int = option(3, "Checkpoints to keep.", group=OUTPUT, rule=at_least_1)
    max_ckpt_mem: float = option(
        1e8, "Most space for checkpoints, in GB (10^9 bytes); the newest is always kept.", group=OUTPUT, rule=positive
    )
    async_save: bool = option(False, "Write checkpoints in the background.", group=OUTPUT)
    resume: bool = option(False, "Go on from the last whole checkpoint in --output_dir.", group=OUTPUT)
    save_trajectories: bool = option(
        False, "Write some prompts, responses and rewards of each step as JSONL.", group=OUTPUT
    )
    num_trajectories_to_save: int = option(
        10, "With --save_trajectories: how many of them.", group=OUTPUT, rule=at_least_1
    )
    use_tensorboard: bool | None = option(None, "Log to TensorBoard; default: where it is installed.", group=OUTPUT)
    use_wandb: bool = option(False, "Log to Weights & Biases.", group=OUTPUT)
    use_trackio: bool = option(False, "Log to Trackio.", group=OUTPUT)
    wandb_project: str = option("lightrft", "Project of wandb and trackio.", group=OUTPUT)
    wandb_run_name: str | None = option(None, "Run name of wandb and trackio.", group=OUTPUT)

    # What from_args did not know; read it with get_extra_arg.
    extra_args: dict[str, Any] = field(default_factory=dict, metadata={})

    # ---- making one --------------------------------------------------------------------------------------------------
    @classmethod
    def from_args(cls, args: Any = None) -> StrategyConfig:
        """Read settings from a Namespace, a mapping, a config, any object with attributes, or None (the defaults).

        Values are converted to their field's type; what no field knows is kept for :meth:`get_extra_arg`. ``args``
        itself is not touched.

        :raises ConfigError: values that cannot be converted, all named.
        """
        given = _as_dict(args)
        clean, problems = config_checks.convert(cls, {name: value for name, value in given.items() if name in FIELDS})
        if problems:
            raise ConfigError([*problems.values()])
        extra = {name: value for name, value in given.items() if name not in FIELDS and name != "extra_args"}
        return cls(**clean, extra_args={**given.get("extra_args", {}), **extra})

    @classmethod
    def from_yaml(cls, path: str | Path) -> StrategyConfig:
        """Read a YAML mapping of settings.

        :raises ConfigError: unknown keys (with the nearest known ones) and values of a wrong type, all at once.
        """
        return cls.from_args(read_yaml(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """All settings as YAML text, grouped as in ``--help``; written to ``path`` where one is given."""
        import yaml

        lines: list[str] = []
        for group, names in field_groups().items():
            lines.append(f"# {group}")
            values = {name: _plain(getattr(self, name)) for name in names}
            lines.append(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        text = "\n".join(lines)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_dict(self) -> dict[str, Any]:
        """Settings by name, without the extra arguments."""
        return {name: getattr(self, name) for name in FIELDS}

    def get_extra_arg(self, name: str, default: Any = None) -> Any:
        """A setting that is none of ours, from the object that ``from_args`` read."""
        return self.extra_args.get(name, default)

    # ---- what follows from the settings ------------------------------------------------------------------------------
    @property
    def backend(self) -> str:
        """Registered name of the training backend: ``--strategy``, else what ``--fsdp`` or its absence says."""
        return self.strategy or ("fsdp" if self.fsdp else "deepspeed")

    @property
    def dtype_name(self) -> Literal["bfloat16", "float16", "float32"]:
        """Precision of the forward pass. ``use_mp_opt`` alone means bfloat16."""
        if self.fp16:
            return "float16"
        return "bfloat16" if self.bf16 or self.use_mp_opt else "float32"

    @property
    def kl_estimator_name(self) -> Literal["k1", "k2", "k3"]:
        """The KL's estimator: ``--kl_estimator``, else the one whose gradient is right where the KL is added."""
        return self.kl_estimator or ("k3" if self.use_kl_loss else "k1")

    @property
    def reward_names(self) -> list[str]:
        """The models that ``--reward_pretrain`` names."""
        return [name.strip() for name in self.reward_pretrain.split(",")] if self.reward_pretrain else []

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches of one optimizer step on each rank."""
        return max(1, self.train_batch_size // (self.micro_train_batch_size * data_parallel_size))

    # ---- checking ----------------------------------------------------------------------------------------------------
    def checked(self, world_size: int | None = None) -> StrategyConfig:
        """A copy with every value converted and every rule held.

        :param world_size: check what depends on it too.
        :raises ConfigError: every fault, each with the flag, the value and what would be right.
        """
        clean, unconverted = config_checks.convert(type(self), self.to_dict())
        config = StrategyConfig(**clean, extra_args=dict(self.extra_args))
        if problems := config_checks.find_faults(config, FIELDS, unconverted, world_size):
            raise ConfigError(problems)
        return config


FIELDS: dict[str, dataclasses.Field[Any]] = {
    spec.name: spec for spec in dataclasses.fields(StrategyConfig) if spec.metadata
}


def field_groups() -> dict[str, list[str]]:
    """Field names by group, both in the order in which they are written above."""
    groups: dict[str, list[str]] = {}
    for name, spec in FIELDS.items():
        groups.setdefault(spec.metadata["group"], []).append(name)
    return groups


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's settings by name.

    :raises ConfigError: it is no mapping, or has keys that no setting bears.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"--config {path}: {error.strerror or error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"--config {path}: not YAML: {error}"]) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigError([f"--config {path}: must be a mapping of settings, found {type(loaded).__name__}"])
    problems = []
    for key in loaded:
        if key not in FIELDS:
            near = difflib.get_close_matches(str(key), FIELDS, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see lightrft train --help for all settings"
            problems.append(f"--config {path}: unknown setting {key!r}; {hint}")
    if problems:
        known = {name: value for name, value in loaded.items() if name in FIELDS}
        raise ConfigError([*problems, *config_checks.convert(StrategyConfig, known)[1].values()])
    return dict(loaded)


def _as_dict(args: Any) -> dict[str, Any]:
    if args is None:
        return {}
    if isinstance(args, Mapping):
        return {str(key): value for key, value in args.items()}
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args)}
    try:
        return dict(vars(args))
    except TypeError:
        known = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
        if known:
            return known
        raise TypeError(
            f"settings from {type(args).__name__}: give a Namespace, a dict, a StrategyConfig or an object with fields"
        ) from None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
