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
    return field(default=default, metadata={"help": help, "group": group, "rule": rule})


positive = (lambda value: value is None or value > 0, "above 0")
at_least_0 = (lambda value: value is None or value >= 0, "0 or more")
at_least_1 = (lambda value: value is None or value >= 1, "at least 1")
share = (lambda value: value is None or 0 <= value <= 1, "between 0 and 1")
above_0_share = (lambda value: value is None or 0 < value <= 1, "above 0 and at most 1")
every = (lambda value: value == -1 or value >= 1, "-1 (never) or a positive count")
a_seed = (lambda value: 0 <= value < 2**32, f"between 0 and {2**32 - 1}, which torch and numpy both take")
shares = (config_checks.are_shares, "positive numbers separated by commas, for example 0.7,0.3")

RUN, BACKEND, ENGINE = "run", "training backend", "inference engine"
MODEL, DATA, ROLLOUT = "models", "data", "rollout"
TRAIN, ALGORITHM, REWARD, OUTPUT = "optimization", "algorithm", "rewards", "output and logging"

# Settings that an out-of-memory error suggests.
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
        "This process's rank on its node, set by the launcher; LOCAL_RANK overrides it.",
        group=RUN,
        rule=(lambda v: v >= -1, "-1 (not given) or more"),
    )
    dist_timeout: float = option(
        600.0, "Seconds to wait for a rank before the run ends with an error that names it.", group=RUN, rule=positive
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
        False, "FSDP: keep parameters in 16 bits and the optimizer's master copy and moments in fp32.", group=BACKEND
    )
    fsdp_cpu_offload: bool = option(
        False,
        "FSDP: keep shards of parameters, gradients and optimizer states on the CPU, and step there.",
        group=BACKEND,
    )
    adam_offload: bool = option(False, "Keep Adam's states on the CPU, and step there.", group=BACKEND)
    zpg: int = option(
        1,
        "DeepSpeed ZeRO++ with stage 3: ranks that share a secondary copy of the parameters.",
        group=BACKEND,
        rule=at_least_1,
    )
    overlap_comm: bool = option(False, "DeepSpeed: overlap gradient reduction with the backward pass.", group=BACKEND)
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, "DeepSpeed: dtype in which gradients accumulate.", group=BACKEND
    )
    sp_size: int = option(
        1,
        "Ranks over which each sequence is split (sequence parallelism).",
        group=BACKEND,
        rule=at_least_1,
    )
    meta_init: bool = option(False, "Build models on the meta device; each rank loads only its shard.", group=BACKEND)
    initial_model_shard_size: int | None = option(
        None, "Ranks over which the reference model is sharded; default: all.", group=BACKEND, rule=at_least_1
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", group=BACKEND
    )

    # ---- inference engine
    engine_type: str = option("vllm", "Rollout engine by its registered name: vllm, sglang or hf.", group=ENGINE)
    engine_tp_size: int = option(
        1, "Ranks over which the engine splits the model (tensor parallelism).", group=ENGINE, rule=at_least_1
    )
    engine_mem_util: float = option(
        0.5, "Fraction of the device's memory that the engine may use.", group=ENGINE, rule=above_0_share
    )
    enable_engine_sleep: bool = option(True, "Let the engine sleep while the trainer trains.", group=ENGINE)
    engine_sleep_level: int = option(
        1,
        "1: a sleeping engine keeps its weights in host memory; 2: it discards them.",
        group=ENGINE,
        rule=(lambda v: v in (1, 2), "1 or 2"),
    )
    max_model_len: int | None = option(
        None,
        "Longest sequence of the engine in tokens (prompt and response); default: the model's.",
        group=ENGINE,
        rule=at_least_1,
    )
    weight_bucket_mb: float = option(
        512.0, "Send weights to the engine in buckets of this many MiB.", group=ENGINE, rule=positive
    )
    verify_weights: Literal["sampled", "full"] = option(
        "sampled", "What is compared after a weight sync: some elements of each tensor, or all.", group=ENGINE
    )
    engine_timeout: float = option(1800.0, "Longest time for one engine call, in seconds.", group=ENGINE, rule=positive)
    limit_mm_image_per_prompt: int = option(
        -1, "Largest number of images in a prompt; -1: no limit.", group=ENGINE, rule=(lambda v: v >= -1, "-1 or more")
    )
    rm_use_engine: bool = option(
        False, "Run --reward_pretrain in the engine of --engine_type (vllm) instead of transformers.", group=ENGINE
    )
    rm_engine_cudagraph: bool = option(False, "With --rm_use_engine: use CUDA graphs; needs a GPU.", group=ENGINE)

    # ---- models
    pretrain: str | None = option(None, "The model to fine-tune: a folder or a hub name.", group=MODEL)
    critic_pretrain: str | None = option(
        None, "With --advantage_estimator gae: the model from which the critic starts.", group=MODEL
    )
    reward_pretrain: str | None = option(
        None, "Reward model: a folder or a hub name; several are separated by commas.", group=MODEL
    )
    flash_attn: bool = option(False, "Use the flash-attn package, which must be installed.", group=MODEL)
    trust_remote_code: bool = option(False, "Run Python code that comes with a model from the hub.", group=MODEL)
    enable_ema: bool = option(
        False, "Keep an exponential moving average of the actor's weights, and save it too.", group=MODEL
    )
    ema_beta: float = option(0.992, "With --enable_ema: decay of the moving average.", group=MODEL, rule=share)
    mixed_mm_data: bool = option(
        False, "FSDP: allow micro-batches with images on some ranks and without on others.", group=MODEL
    )
    packing_samples: bool = option(
        False, "Pack the samples of a micro-batch into one row without padding.", group=MODEL
    )
    fused_linear_logprob: bool = option(
        False,
        "Compute logprobs from hidden states in chunks, so that the whole logits are never in memory.",
        group=MODEL,
    )
    chunk_size: int = option(4096, "With --fused_linear_logprob: tokens per chunk.", group=MODEL, rule=at_least_1)
    lora_rank: int = option(
        0, "Train LoRA adapters of this rank instead of all weights; 0: no LoRA.", group=MODEL, rule=at_least_0
    )
    lora_alpha: float = option(
        16.0, "With --lora_rank: adapters are scaled by this number divided by the rank.", group=MODEL, rule=positive
    )
    lora_dropout: float = option(
        0.0,
        "With --lora_rank: dropout on the input of the adapters in training.",
        group=MODEL,
        rule=(lambda v: 0 <= v < 1, "0 or more and below 1"),
    )
    target_modules: str = option(
        "all-linear",
        "With --lora_rank: names of the layers that get adapters, separated by commas; all-linear: all but the output.",
        group=MODEL,
        rule=(lambda v: bool(v.strip(", ")), "all-linear or names of linear layers, for example q_proj,v_proj"),
    )

    # ---- data
    prompt_data: str | None = option(
        None,
        "Prompts: a .jsonl or .parquet file, a dataset's name or reasoning_gym:TASK; several are separated by commas.",
        group=DATA,
    )
    prompt_data_probs: str | None = option(
        None,
        "With several --prompt_data: the proportions in which they are mixed, separated by commas.",
        group=DATA,
        rule=shares,
    )
    prompt_split: str = option("train", "Split of --prompt_data.", group=DATA)
    eval_data: str | None = option(None, "Held-out prompts, in any form that --prompt_data accepts.", group=DATA)
    eval_split: str = option("test", "Split of --eval_data.", group=DATA)
    eval_steps: int = option(
        -1, "Steps between evaluations; -1: only before and after the training.", group=DATA, rule=every
    )
    max_eval_samples: int = option(500, "Largest number of held-out prompts.", group=DATA, rule=at_least_1)
    input_key: str = option("input", "Key of the prompt.", group=DATA)
    label_key: str = option("label", "Key of the reference answer.", group=DATA)
    images_key: str = option("image", "Key of the images.", group=DATA)
    system_prompt: str | None = option(None, "With --apply_chat_template: the system message.", group=DATA)
    input_template: str | None = option(
        None,
        "Template of a prompt; {} stands for the input.",
        group=DATA,
        rule=(lambda v: v is None or "{}" in v, "a text with {} where the input belongs"),
    )
    apply_chat_template: bool = option(False, "Apply the tokenizer's chat template.", group=DATA)
    max_samples: int = option(1_000_000, "Largest number of prompts to read.", group=DATA, rule=at_least_1)
    prompt_max_len: int = option(1024, "Longest prompt in tokens.", group=DATA, rule=at_least_1)

    # ---- rollout
    rollout_batch_size: int = option(512, "Prompts per step, over all ranks.", group=ROLLOUT, rule=at_least_1)
    micro_rollout_batch_size: int = option(
        8, "Samples per forward pass on one rank, when rollouts are scored.", group=ROLLOUT, rule=at_least_1
    )
    n_samples_per_prompt: int = option(8, "Samples per prompt.", group=ROLLOUT, rule=at_least_1)
    generate_max_len: int = option(1024, "Longest response in tokens.", group=ROLLOUT, rule=at_least_1)
    temperature: float = option(1.0, "Sampling temperature.", group=ROLLOUT, rule=positive)
    top_p: float = option(
        1.0,
        "Sample from the smallest set of likeliest tokens with this total probability.",
        group=ROLLOUT,
        rule=above_0_share,
    )
    top_k: int = option(
        -1,
        "Sample from this many likeliest tokens; -1 or 0: all.",
        group=ROLLOUT,
        rule=(lambda v: v >= -1, "-1 or 0 (all tokens), or a positive count"),
    )
    min_p: float = option(
        0.0,
        "Never sample tokens whose probability is below this fraction of the likeliest token's.",
        group=ROLLOUT,
        rule=share,
    )
    dynamic_sampling: bool = option(
        False, "Replace groups whose rewards are all equal by new prompts (DAPO, arXiv:2503.14476).", group=ROLLOUT
    )
    dynamic_sampling_max_rounds: int = option(
        4, "With --dynamic_sampling: largest number of draws of prompts in a step.", group=ROLLOUT, rule=at_least_1
    )

    # ---- optimization
    train_batch_size: int = option(128, "Samples per optimizer step, over all ranks.", group=TRAIN, rule=at_least_1)
    micro_train_batch_size: int = option(
        1, "Samples per forward and backward pass on one rank.", group=TRAIN, rule=at_least_1
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Fill each micro-batch with samples up to this many tokens, instead of --micro_train_batch_size samples.",
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
    ] = option("cosine_with_min_lr", "Learning-rate schedule, by its name in transformers.", group=TRAIN)
    lr_warmup_ratio: float = option(
        0.03, "Fraction of the steps in which the learning rate warms up.", group=TRAIN, rule=share
    )
    num_episodes: int = option(1, "Passes over the prompts.", group=TRAIN, rule=at_least_1)
    max_epochs: int = option(1, "Passes over the samples of each step.", group=TRAIN, rule=at_least_1)
    max_steps: int | None = option(
        None, "Largest number of steps; default: all prompts, --num_episodes times.", group=TRAIN, rule=at_least_1
    )
    freezing_actor_steps: int = option(
        -1,
        "Number of first steps in which only the critic is trained; -1: none.",
        group=TRAIN,
        rule=(lambda v: v >= -1, "-1 or more"),
    )

    # ---- algorithm
    advantage_estimator: Literal["group_norm", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline", "gae"] = (
        option(
            "group_norm", "How advantages are computed from rewards; group_norm and grpo are the same.", group=ALGORITHM
        )
    )
    gamma: float = option(1.0, "Discount factor of rewards.", group=ALGORITHM, rule=share)
    lambd: float = option(0.95, "With --advantage_estimator gae: GAE's lambda.", group=ALGORITHM, rule=share)
    eps_clip: float = option(0.2, "Clip range of the policy ratio.", group=ALGORITHM, rule=positive)
    eps_clip_high: float | None = option(
        None, "Upper clip range; default: --eps_clip (DAPO's clip-higher).", group=ALGORITHM, rule=positive
    )
    value_clip: float = option(
        0.2, "With --advantage_estimator gae: clip range of the critic's values.", group=ALGORITHM, rule=positive
    )
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = option(
        "token-mean", "How the losses of tokens are averaged.", group=ALGORITHM
    )
    use_gspo: bool = option(
        False,
        "Use one policy ratio per sequence (GSPO, arXiv:2507.18071, with --eps_clip 3e-4 --eps_clip_high 4e-4).",
        group=ALGORITHM,
    )
    use_cpg_loss: bool = option(
        False, "Use the clipped policy gradient with policy drift (CPGD, arXiv:2505.12504).", group=ALGORITHM
    )
    policy_drift_coef: float = option(
        0.0,
        "With --use_cpg_loss: weight of the drift from the policy that generated the samples.",
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
        0.01,
        "Weight of the KL divergence from the reference model; 0: no reference model is loaded.",
        group=ALGORITHM,
        rule=at_least_0,
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = option(
        None,
        "Estimator of the KL divergence; default: k1 in the reward, k3 in the loss. k2 and k3 in the reward, and k1 in "
        "the loss, hardly pull toward the reference.",
        group=ALGORITHM,
    )
    use_kl_loss: bool = option(False, "Add the KL to the loss instead of the reward.", group=ALGORITHM)
    kl_target: float | None = option(
        None,
        "Adapt the KL's weight so that the KL approaches this value, in nats per token.",
        group=ALGORITHM,
        rule=positive,
    )
    kl_horizon: int = option(
        10000, "With --kl_target: samples over which the KL's weight adapts.", group=ALGORITHM, rule=at_least_1
    )
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.", group=ALGORITHM, rule=at_least_0)
    high_entropy_token_ratio: float = option(
        0.0,
        "Train only on this fraction of tokens, those with the highest entropy (arXiv:2506.01939); 0: on all.",
        group=ALGORITHM,
        rule=share,
    )
    advantages_norm: bool = option(False, "Whiten advantages over the whole batch.", group=ALGORITHM)
    advantage_clip: float = option(
        0.0, "Clip advantages to this absolute value; 0: no clipping.", group=ALGORITHM, rule=at_least_0
    )
    importance_sampling_cap: float = option(
        0.0,
        "Weight tokens by trainer/engine probability, at most this (truncated importance sampling); 0: off.",
        group=ALGORITHM,
        rule=at_least_0,
    )
    max_logprob_drift: float | None = option(
        None,
        "Stop the run when the mean difference between engine and trainer logprobs exceeds this.",
        group=ALGORITHM,
        rule=positive,
    )

    # ---- rewards
    reward: str | None = option(
        None,
        "Reward rules by name, or module:function; several are separated by commas and weighted by name=weight.",
        group=REWARD,
    )
    remote_rm_url: str | None = option(None, "URL of a reward server; several are separated by commas.", group=REWARD)
    reward_timeout: float = option(60.0, "Longest time for one reward call, in seconds.", group=REWARD, rule=positive)
    reward_clip: float = option(
        0.0, "Clip rewards to this absolute value; 0: no clipping.", group=REWARD, rule=at_least_0
    )
    reward_running_norm: bool = option(False, "Divide rewards by their running standard deviation.", group=REWARD)
    reward_running_norm_minus_mean: bool = option(
        False, "With --reward_running_norm: subtract the running mean first.", group=REWARD
    )
    overlong_buffer: bool = option(False, "Penalize responses near the length limit (DAPO).", group=REWARD)
    overlong_buffer_len: int = option(
        1024,
        "With --overlong_buffer: number of tokens before the limit over which the penalty grows.",
        group=REWARD,
        rule=at_least_1,
    )
    overlong_buffer_penalty_factor: float = option(
        1.0, "With --overlong_buffer: largest penalty.", group=REWARD, rule=at_least_0
    )

    # ---- output and logging
    output_dir: str = option(
        "lightrft_runs/latest",
        "Folder for the run's configuration, metrics, plots, checkpoints and model.",
        group=OUTPUT,
    )
    log_dir: str | None = option(None, "Folder for plots and logs; default: --output_dir.", group=OUTPUT)
    plot_every: int = option(10, "Steps between plots of response lengths; -1: never.", group=OUTPUT, rule=every)
    save_steps: int = option(
        -1, "Steps between checkpoints; -1: only at the end and on Ctrl-C.", group=OUTPUT, rule=every
    )
    max_ckpt_num: int = option(3, "Number of checkpoints to keep.", group=OUTPUT, rule=at_least_1)
    max_ckpt_mem: float = option(
        1e8, "Disk space for checkpoints in GB (10^9 bytes); the newest is always kept.", group=OUTPUT, rule=positive
    )
    async_save: bool = option(False, "Write checkpoints in the background.", group=OUTPUT)
    resume: bool = option(False, "Continue from the last complete checkpoint in --output_dir.", group=OUTPUT)
    save_trajectories: bool = option(
        False, "Write some prompts, responses and rewards of each step as JSONL.", group=OUTPUT
    )
    num_trajectories_to_save: int = option(
        10, "With --save_trajectories: how many per step.", group=OUTPUT, rule=at_least_1
    )
    use_tensorboard: bool | None = option(None, "Log to TensorBoard; default: if it is installed.", group=OUTPUT)
    use_wandb: bool = option(False, "Log to Weights & Biases.", group=OUTPUT)
    use_trackio: bool = option(False, "Log to Trackio.", group=OUTPUT)
    wandb_project: str = option("lightrft", "Project name for wandb and trackio.", group=OUTPUT)
    wandb_run_name: str | None = option(None, "Run name for wandb and trackio.", group=OUTPUT)

    # Settings that from_args did not know; read them with get_extra_arg.
    extra_args: dict[str, Any] = field(default_factory=dict)

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
        # A config's own, also after dataclasses.asdict; a script's flag of that name may hold anything.
        nested = extra if isinstance(extra := given.get("extra_args"), Mapping) else {}
        extra = {name: value for name, value in given.items() if name not in FIELDS and value is not nested}
        return cls(**clean, extra_args={**nested, **extra})

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
        """A setting that this class does not have, from the object that ``from_args`` read; else one that it has.

        A script need not know which settings are ours, and keeps its value if a later version makes it one.
        """
        return self.extra_args.get(name, getattr(self, name) if name in FIELDS else default)

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
        if problems := config_checks.find_faults(config, unconverted, world_size):
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

    :raises ConfigError: it is not a mapping, or has keys that are not settings.
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
    """What a mapping or an object holds; an object's class may hold it too, settings also as properties or slots."""
    if args is None:
        return {}
    if all(hasattr(type(args), name) for name in ("keys", "__getitem__")):  # what dict() takes for a mapping
        return {str(key): value for key, value in dict(args).items()}
    kind = args if isinstance(args, type) else type(args)
    given: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        given |= {name: value for name, value in vars(base).items() if name[0] != "_" and not _is_code(value)}
    given |= {name: value for name in FIELDS if not _is_code(value := getattr(args, name, None)) and value is not None}
    if dataclasses.is_dataclass(args):
        given |= {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args) if hasattr(args, spec.name)}
    if kind is not args:
        given |= getattr(args, "__dict__", {})
    if not given and not hasattr(args, "__dict__"):
        raise TypeError(
            f"settings from {type(args).__name__}: give a Namespace, a dict, a StrategyConfig or an object with fields"
        )
    return given


def _is_code(value: Any) -> bool:
    """Whether a class has this to be called: a method, a property, a class within."""
    return callable(value) or hasattr(type(value), "__get__")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
