"""Checks of a run's settings in addition to those of a strategy: pure, without torch."""

from __future__ import annotations

from collections.abc import Callable

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.config_checks import Rules, out_of_range
from lightrft.strategy.engine_checks import one_rank_only

# How the lines of ``--prompt_data`` are read; the built-in task has a form of its own.
DATA_FORM = "input_key label_key input_template apply_chat_template"
# Settings that only others bring into effect: their names, the others, whether they do, and what to give.
ONLY_WITH: tuple[tuple[str, str, Callable[[StrategyConfig], bool], str], ...] = (
    (
        "lambd value_clip critic_learning_rate critic_pretrain",
        "advantage_estimator",
        lambda c: c.advantage_estimator == "gae",
        "--advantage_estimator gae",
    ),
    ("kl_horizon", "kl_target", lambda c: c.kl_target is not None, "--kl_target"),
    ("ema_beta", "enable_ema", lambda c: c.enable_ema, "--enable_ema"),
    (
        "overlong_buffer_len overlong_buffer_penalty_factor",
        "overlong_buffer",
        lambda c: c.overlong_buffer,
        "--overlong_buffer",
    ),
    ("dynamic_sampling_max_rounds", "dynamic_sampling", lambda c: c.dynamic_sampling, "--dynamic_sampling"),
    ("num_trajectories_to_save", "save_trajectories", lambda c: c.save_trajectories, "--save_trajectories"),
    (
        "initial_model_shard_size",
        "init_kl_coef lora_rank",
        lambda c: c.init_kl_coef > 0 and not c.lora_rank,
        "a reference model: --init_kl_coef above 0 and no --lora_rank",
    ),
    (
        DATA_FORM,
        "prompt_data",
        lambda c: c.prompt_data is not None,
        "--pretrain and --prompt_data; the built-in task has its own form",
    ),
    ("system_prompt", "apply_chat_template", lambda c: c.apply_chat_template, "--apply_chat_template"),
    ("rm_engine_cudagraph", "rm_use_engine", lambda c: c.rm_use_engine, "--rm_use_engine"),
)


def run_faults(config: StrategyConfig, *, multimodal: bool = False, world_size: int | None = None) -> list[str]:
    """One sentence for each fault: which flag, which value, what would be right.

    Settings that are out of their own range are not reported here: the strategy's check does that.
    """
    wrong = out_of_range(config)
    found = RULES.faults(config, wrong)
    if multimodal and config.pretrain is None and config.prompt_data is None:
        found.append(
            "--pretrain and --prompt_data: train-vl has no built-in task; name a vision-language model and its data"
        )
    if multimodal and config.sp_size > 1:
        found.append(f"--sp_size {config.sp_size}: sequences with images cannot be split over ranks; use 1")
    if world_size is not None and not wrong.keys() & {"rollout_batch_size", "sp_size"}:
        ranks = max(1, world_size // config.sp_size)
        if config.rollout_batch_size % ranks:
            found.append(
                f"--rollout_batch_size {config.rollout_batch_size}: must be a multiple of the {ranks} data ranks"
            )
    return found


RULES = Rules()
for _row in ONLY_WITH:
    RULES.only_with(*_row)


@RULES.between("engine_type", "engine_tp_size")
def _an_engine_that_splits(c: StrategyConfig) -> str | None:
    """Other engines declare it in their capabilities, which cannot be read without torch."""
    return one_rank_only("hf", c.engine_tp_size) if c.engine_type == "hf" and c.engine_tp_size > 1 else None


@RULES.between("flash_attn", "bf16", "fp16", "use_mp_opt")
def _flash_attention_in_16_bit(c: StrategyConfig) -> str | None:
    if not c.flash_attn or c.dtype_name != "float32":
        return None
    return "--flash_attn: needs 16 bits and this run computes in fp32; add --bf16, or drop the flag (SDPA is used)"


@RULES.between("train_batch_size", "rollout_batch_size", "n_samples_per_prompt")
def _whole_optimizer_steps(c: StrategyConfig) -> str | None:
    samples = c.rollout_batch_size * c.n_samples_per_prompt
    if samples % c.train_batch_size == 0:
        return None
    return (
        f"--train_batch_size {c.train_batch_size}: must divide the number of samples per step, "
        f"rollout_batch_size × n_samples_per_prompt = {c.rollout_batch_size} × {c.n_samples_per_prompt} = {samples}"
    )


@RULES.between("max_tokens_per_micro_batch", "prompt_max_len", "generate_max_len")
def _room_for_a_sample(c: StrategyConfig) -> str | None:
    longest = c.prompt_max_len + c.generate_max_len
    if c.max_tokens_per_micro_batch is None or c.max_tokens_per_micro_batch >= longest:
        return None
    return (
        f"--max_tokens_per_micro_batch {c.max_tokens_per_micro_batch}: a sample can have prompt_max_len + "
        f"generate_max_len = {c.prompt_max_len} + {c.generate_max_len} = {longest} tokens; raise it, or lower those two"
    )


@RULES.between("pretrain", "prompt_data")
def _model_and_data_together(c: StrategyConfig) -> str | None:
    if (c.pretrain is None) == (c.prompt_data is None):
        return None
    given, missing = ("--pretrain", "--prompt_data") if c.prompt_data is None else ("--prompt_data", "--pretrain")
    return f"{missing}: needed with {given}; drop both for the built-in task and model"


@RULES.between("prompt_data", "reward", "remote_rm_url", "reward_pretrain")
def _something_that_grades(c: StrategyConfig) -> str | None:
    if c.prompt_data is None or c.reward or c.remote_rm_url or c.reward_pretrain:
        return None
    return (
        "--reward: needed with --prompt_data: a rule such as exact_match or numeric_answer, or module:function; "
        "--remote_rm_url and --reward_pretrain also grade"
    )


@RULES.between("rm_use_engine", "reward_pretrain")
def _a_reward_model_to_serve(c: StrategyConfig) -> str | None:
    if not c.rm_use_engine or c.reward_pretrain:
        return None
    return "--rm_use_engine: runs the model of --reward_pretrain, which is not given; add it, or drop --rm_use_engine"


@RULES.between("eval_data", "prompt_data")
def _held_out_of_something(c: StrategyConfig) -> str | None:
    if c.eval_data is None or c.prompt_data is not None:
        return None
    return "--eval_data: works only with --prompt_data; the built-in task has its own held-out prompts"


@RULES.between("use_gspo", "loss_agg_mode")
def _gspo_averages_sequences(c: StrategyConfig) -> str | None:
    if not c.use_gspo or c.loss_agg_mode == "seq-mean-token-mean":
        return None
    return (
        f"--loss_agg_mode {c.loss_agg_mode}: GSPO's objective averages over sequences; "
        "add --loss_agg_mode seq-mean-token-mean"
    )


@RULES.between("kl_target", "init_kl_coef")
def _a_weight_to_adapt(c: StrategyConfig) -> str | None:
    if c.kl_target is None or c.init_kl_coef > 0:
        return None
    return "--kl_target: adapts --init_kl_coef, which is 0; start it above 0"


@RULES.between("use_kl_loss", "init_kl_coef")
def _a_weight_for_the_kl(c: StrategyConfig) -> str | None:
    if not c.use_kl_loss or c.init_kl_coef > 0:
        return None
    return "--use_kl_loss: weighs the KL by --init_kl_coef, which is 0; set it above 0"


@RULES.between("freezing_actor_steps", "advantage_estimator")
def _a_critic_to_train_first(c: StrategyConfig) -> str | None:
    if c.freezing_actor_steps <= 0 or c.advantage_estimator == "gae":
        return None
    return f"--freezing_actor_steps {c.freezing_actor_steps}: only --advantage_estimator gae has a critic to train"


@RULES.between("importance_sampling_cap", "max_logprob_drift", "top_p", "top_k", "min_p")
def _comparable_distributions(c: StrategyConfig) -> str | None:
    """Trainer logprobs know only the temperature: those of a truncated distribution cannot be compared."""
    flag = "importance_sampling_cap" if c.importance_sampling_cap > 0 else "max_logprob_drift"
    if getattr(c, flag) in (None, 0.0) or (c.top_p == 1 and c.top_k <= 0 and c.min_p == 0):
        return None
    return f"--{flag}: compares full distributions; leave --top_p, --top_k and --min_p at their defaults"


@RULES.between("dynamic_sampling", "n_samples_per_prompt")
def _groups_that_can_differ(c: StrategyConfig) -> str | None:
    if not c.dynamic_sampling or c.n_samples_per_prompt > 1:
        return None
    return "--dynamic_sampling: compares the samples of a prompt; set --n_samples_per_prompt to at least 2"


@RULES.between("overlong_buffer", "overlong_buffer_len", "generate_max_len")
def _a_buffer_within_the_limit(c: StrategyConfig) -> str | None:
    if not c.overlong_buffer or c.overlong_buffer_len < c.generate_max_len:
        return None
    return (
        f"--overlong_buffer_len {c.overlong_buffer_len}: must be below --generate_max_len {c.generate_max_len}, or "
        "every response is penalized from its first token"
    )
