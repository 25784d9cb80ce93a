"""What a run needs of its settings beyond what a strategy needs: pure, without torch."""

from __future__ import annotations

from lightrft.strategy.config import StrategyConfig

GROUP_ESTIMATORS = ("group_norm", "grpo", "dr_grpo", "rloo")


def run_faults(config: StrategyConfig, *, multimodal: bool = False, world_size: int | None = None) -> list[str]:
    """One sentence for each fault: which flag, which value, what would be right."""
    c = config
    problems: list[str] = []
    samples = c.rollout_batch_size * c.n_samples_per_prompt
    if samples % c.train_batch_size:
        problems.append(
            f"--train_batch_size {c.train_batch_size}: must divide a step's samples, "
            f"rollout_batch_size × n_samples_per_prompt = {c.rollout_batch_size} × {c.n_samples_per_prompt} = {samples}"
        )
    if (c.pretrain is None) != (c.prompt_data is None):
        given, missing = ("--pretrain", "--prompt_data") if c.prompt_data is None else ("--prompt_data", "--pretrain")
        problems.append(f"{missing}: needed with {given}; leave both away for the built-in task and model")
    if multimodal and c.pretrain is None and c.prompt_data is None:
        problems.append(
            "--pretrain and --prompt_data: train-vl has no built-in task; name a vision-language model and its data"
        )
    if c.prompt_data is not None and not (c.reward or c.remote_rm_url or c.reward_pretrain):
        problems.append(
            "--reward: needed with --prompt_data (a rule such as exact or numeric, or module:function), or --remote_rm_url"
        )
    if c.eval_data is not None and c.prompt_data is None:
        problems.append("--eval_data: works only with --prompt_data; the built-in task has its own held-out part")
    if c.use_gspo and c.loss_agg_mode != "seq-mean-token-mean":
        problems.append(
            f"--loss_agg_mode {c.loss_agg_mode}: GSPO's objective averages over sequences; add --loss_agg_mode seq-mean-token-mean"
        )
    if c.kl_target is not None and c.init_kl_coef == 0:
        problems.append("--kl_target: adapts --init_kl_coef, which is 0; give it a start above 0")
    if c.use_kl_loss and c.init_kl_coef == 0:
        problems.append("--use_kl_loss: weighs the KL by --init_kl_coef, which is 0; give it a value above 0")
    if c.critic_pretrain is not None and c.advantage_estimator != "gae":
        problems.append(
            f"--critic_pretrain: only --advantage_estimator gae has a critic; it is {c.advantage_estimator}"
        )
    if c.freezing_actor_steps > 0 and c.advantage_estimator != "gae":
        problems.append(
            f"--freezing_actor_steps {c.freezing_actor_steps}: only --advantage_estimator gae has a critic to train meanwhile"
        )
    if c.importance_sampling_cap > 0 and (c.top_p < 1 or c.top_k > 0 or c.min_p > 0):
        problems.append(
            "--importance_sampling_cap: compares full distributions; leave --top_p, --top_k and --min_p at their defaults"
        )
    if c.max_logprob_drift is not None and (c.top_p < 1 or c.top_k > 0 or c.min_p > 0):
        problems.append(
            "--max_logprob_drift: compares full distributions; leave --top_p, --top_k and --min_p at their defaults"
        )
    if c.dynamic_sampling and c.advantage_estimator not in GROUP_ESTIMATORS and c.n_samples_per_prompt < 2:
        problems.append(
            "--dynamic_sampling: compares the samples of a prompt; set --n_samples_per_prompt to at least 2"
        )
    if c.overlong_buffer and c.overlong_buffer_len > c.generate_max_len:
        problems.append(
            f"--overlong_buffer_len {c.overlong_buffer_len}: must be at most --generate_max_len {c.generate_max_len}"
        )
    if world_size is not None:
        ranks = max(1, world_size // max(1, c.sp_size))
        if c.rollout_batch_size % ranks:
            problems.append(
                f"--rollout_batch_size {c.rollout_batch_size}: must be a multiple of the {ranks} data ranks"
            )
    return problems
