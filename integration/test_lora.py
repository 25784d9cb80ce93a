"""LoRA on every backend: the trajectory of one process, the weights that peft merges, checkpoints that go anywhere.

uv run nox -s integration -- -k lora
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from lightrft.models import Actor, pad_rows
from lightrft.models.lora import WithoutAdapters, add_adapters, save_adapter
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import (
    RankPool,
    Recipe,
    compare,
    deviation_table,
    reference_trajectory,
    run_trajectory,
    save_tiny_model,
    tiny_model,
)
from lightrft.testing.tiny_models import set_adapters
from lightrft.testing.trajectory import verdict
from lightrft.trainer import SPMDPPOTrainer
from lightrft.trainer.metrics import METRICS_FILE, read_metrics
from lightrft.trainer.run import train

BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "FSDP2": {"fsdp": True},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
}
# Stages 1 and 2 keep parameters whole: what adapters meet there is FSDP2's export or stage 3's, and less.
EACH = [pytest.param(name, marks=[pytest.mark.full] if name in ("ZeRO 1", "ZeRO 2") else []) for name in BACKENDS]
BF16 = {"bf16": True}
Tensors = dict[str, torch.Tensor]


# ---- trajectory ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class AdaptedRecipe(Recipe):
    """Trains adapters beside frozen weights."""

    def models(self) -> dict[str, nn.Module]:
        made = super().models()
        for model in made.values():
            add_adapters(model, "generator", rank=4)
            set_adapters(model)
        return made


RECIPE = AdaptedRecipe(steps=10, accumulation=2)


def follow(settings: Mapping[str, Any]) -> Any:
    """On a rank."""
    return run_trajectory(get_strategy(StrategyConfig(**RECIPE.settings(2), **settings)), RECIPE)


@pytest.mark.parametrize("backend", EACH)
def test_the_trajectory_is_that_of_one_process(ranks: RankPool, backend: str) -> None:
    trajectory, reference = ranks.run(follow, BACKENDS[backend])[0], reference_trajectory(RECIPE)
    deviation = compare(trajectory, reference)
    faults, floor = verdict(deviation, RECIPE)
    sys.stdout.write(deviation_table({backend: deviation, "the floor": floor}))
    assert not faults
    assert all("lora_" in name for name in trajectory.first_moments), "nothing else has moments"


# ---- export, files, checkpoints --------------------------------------------------------------------------------------
def prepared(settings: Mapping[str, Any], base: str, values: bool = True) -> tuple[Any, Any, Any]:
    """On a rank: strategy, adapted actor, optimizer."""
    config = StrategyConfig(micro_train_batch_size=1, train_batch_size=2, max_norm=0.5, seed=3, **settings)
    strategy = get_strategy(config)
    actor = Actor(base, dtype=getattr(torch, config.dtype_name), lora_rank=4, lora_alpha=6.0)
    if values:
        set_adapters(actor)
    actor = strategy.prepare(actor)
    return strategy, actor, strategy.create_optimizer(actor, lr=1e-2)


def step(strategy: Any, actor: Any, optimizer: Any, steps: range) -> None:
    for number in steps:
        tokens = torch.randint(7, 512, (2, 8), generator=torch.Generator().manual_seed(number))
        loss = -actor(tokens[strategy.rank : strategy.rank + 1]).mean()
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor)


def exported(strategy: Any, actor: Any, dtype: torch.dtype | None = None) -> Tensors:
    specs = tuple(spec.cast(dtype) for spec in strategy.export_spec(actor))
    plan = UpdatePlan(version=1, specs=specs, dtype=dtype, bucket_bytes=2**15)
    buckets = strategy.export_weights(actor, plan)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket.tensors.items()}


ROWS = pad_rows([[5, 6, 7], [8, 9, 10, 11]], [[20, 21, 2], [30, 2]], pad_token_id=0)
ASKED = (ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)


@torch.no_grad()
def says(folder: str | Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The logprobs of a saved model, with a saved adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return Actor(model if adapter is None else PeftModel.from_pretrained(model, str(adapter)))(*ASKED)


def rounding_of(folder: Path) -> float:
    """How far from fp32 a saved model's logprobs may be in bf16: four times as far as a plain forward's."""
    return 4 * float((says(folder) - says(folder, dtype=torch.bfloat16)).abs().max())


def train_and_save(settings: Mapping[str, Any], base: str, folder: Path) -> dict[str, Any]:
    """On a rank: three steps, everything that can be said and saved of them, and two more."""
    strategy, actor, optimizer = prepared(settings, base)
    average = strategy.prepare_average(set_adapters(Actor(base, lora_rank=4, lora_alpha=6.0)))
    by_hand = {item.name: item.weight.float() for item in strategy.iter_state(actor)}
    for number in range(3):
        step(strategy, actor, optimizer, range(number, number + 1))
        strategy.moving_average(actor, average, beta=0.5)
        now = {item.name: item.weight.float() for item in strategy.iter_state(actor)}
        by_hand = {name: torch.lerp(weight, now[name], 0.5) for name, weight in by_hand.items()}
    found: dict[str, Any] = {
        "average": {item.name: item.weight for item in strategy.iter_state(average)},
        "by_hand": by_hand,
        "state": {item.name: item.weight for item in strategy.iter_state(actor, optimizer)},
        "merged": exported(strategy, actor),
        "rounded": exported(strategy, actor, torch.bfloat16),
        "reference": WithoutAdapters(actor)(*ASKED),
    }
    with torch.no_grad():
        found["logprobs"] = actor(*ASKED)
    strategy.save_ckpt(actor, folder / "ckpt")
    strategy.save_model(actor, None, folder / "model")
    save_adapter(strategy, actor, folder / "adapter")
    step(strategy, actor, optimizer, range(3, 5))
    found["later"] = exported(strategy, actor)
    return found


def go_on(settings: Mapping[str, Any], base: str, ckpt: Path) -> Tensors:
    """On a rank: from a checkpoint, two more steps."""
    strategy, actor, optimizer = prepared(settings, base, values=False)
    strategy.load_ckpt(actor, ckpt)
    step(strategy, actor, optimizer, range(3, 5))
    return exported(strategy, actor)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model("qwen2", tmp_path_factory.mktemp("base") / "qwen2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def run_on(ranks: RankPool, base: str, folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What every rank of a backend found."""
    return functools.cache(lambda name: ranks.run(train_and_save, BACKENDS[name], base, folder / name))


def holding(state: Tensors, base: str) -> Actor:
    """An adapted actor with these parameters, in fp32."""
    actor = Actor(base, lora_rank=4, lora_alpha=6.0)
    actor.load_state_dict(state)
    return actor


def merged_by_peft(state: Tensors, base: str) -> Tensors:
    """Hub names and values after peft's own merge, from the parameters of an adapted actor."""
    actor = holding(state, base)
    for module in actor.modules():
        if isinstance(module, LoraLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in hub_sources(actor)}
    layout = HubLayout(tiny_model("qwen2"))
    return {hub.name: plain[f"model.{hub.source}"].detach() for hub in layout.by_name.values()}


@pytest.mark.parametrize("backend", EACH)
def test_every_rank_exports_what_peft_merges(run_on: Any, base: str, backend: str) -> None:
    for found in run_on(backend):
        expected = merged_by_peft(found["state"], base)
        assert found["merged"].keys() == expected.keys()
        assert all(torch.allclose(found["merged"][n], expected[n], rtol=0, atol=1e-6) for n in expected)
        assert all(torch.equal(found["rounded"][n], found["merged"][n].bfloat16()) for n in expected), "rounded once"


@pytest.mark.parametrize("backend", EACH)
def test_the_average_of_an_adapted_actor_follows_its_adapters(run_on: Any, backend: str) -> None:
    for found in run_on(backend):
        assert found["average"].keys() == found["by_hand"].keys() == found["state"].keys()
        for name, weight in found["average"].items():
            assert torch.allclose(weight, found["by_hand"][name], rtol=0, atol=1e-6), name
            assert torch.equal(weight, found["state"][name]) == ("lora_" not in name), name


@pytest.mark.parametrize("backend", EACH)
def test_in_bfloat16_frozen_weights_are_16_bit_and_adapters_keep_their_last_places(
    ranks: RankPool, base: str, tmp_path: Path, backend: str
) -> None:
    for found in ranks.run(train_and_save, {**BACKENDS[backend], **BF16}, base, tmp_path):
        for name, weight in found["state"].items():
            lasts = torch.equal(weight, weight.bfloat16().to(weight.dtype))
            assert lasts != ("lora_" in name), f"{name} is rounded, or is not"
        # DeepSpeed holds all that computes in bf16, and fp32 masters of what trains beside it.
        factors = {n: w if backend == "FSDP2" else w.bfloat16().float() for n, w in found["state"].items()}
        expected = merged_by_peft(factors, base)
        for name, weight in found["merged"].items():
            assert weight.dtype == torch.bfloat16
            assert torch.allclose(weight.float(), expected[name], rtol=2**-8, atol=1e-6), name
        with torch.no_grad():
            exact, rounded = holding(found["state"], base)(*ASKED), holding(found["state"], base).bfloat16()(*ASKED)
        assert (found["logprobs"] - exact).norm() < 4 * (rounded - exact).norm(), "as one process in bf16"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in found["merged"].items())


@pytest.mark.parametrize("backend", EACH)
def test_without_its_adapters_the_actor_is_its_own_reference(run_on: Any, base: str, backend: str) -> None:
    for found in run_on(backend):
        assert torch.allclose(found["reference"], says(base), atol=1e-5)
        assert not torch.allclose(found["logprobs"], says(base), atol=1e-2), "the adapters are back"


@pytest.mark.parametrize("backend", EACH)
def test_the_saved_model_and_adapter_say_what_the_actor_says(
    run_on: Any, base: str, folder: Path, backend: str
) -> None:
    logprobs = run_on(backend)[0]["logprobs"]
    for said in (says(folder / backend / "model"), says(base, folder / backend / "adapter")):
        assert torch.allclose(said, logprobs, atol=2e-5)


@pytest.mark.parametrize("after", EACH)
@pytest.mark.parametrize("before", EACH)
def test_training_goes_on_from_any_backends_checkpoint(
    ranks: RankPool, run_on: Any, base: str, folder: Path, before: str, after: str
) -> None:
    expected, found = run_on(before)[0], ranks.run(go_on, BACKENDS[after], base, folder / before / "ckpt")[0]
    exact = before == after
    for name, value in expected["later"].items():
        assert torch.equal(found[name], value) if exact else torch.allclose(found[name], value, rtol=0, atol=1e-5), name


# ---- the trainer -----------------------------------------------------------------------------------------------------
REWARD = """
def odd(prompts, responses, labels, **extras):
    return [sum(ord(c) % 2 for c in response) / max(1, len(response)) for response in responses]
"""
# What else a run asks for beside adapters.
LONG = {"packing_samples": True, "fused_linear_logprob": True, "sp_size": 2, "gradient_checkpointing": True}
CRITIC = {"advantage_estimator": "gae", "critic_learning_rate": 1e-2, "enable_ema": True, "ema_beta": 0.5}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "alone": {},
    "long sequences": LONG,
    "critic and average": CRITIC,
    "bf16": BF16,
    "all at once": {**LONG, **CRITIC, **BF16},
}
DEFAULT_RUNS = {("FSDP2", "critic and average"), ("ZeRO 3", "alone")}


def cells(default: Collection[tuple[str, str]]) -> list[Any]:
    """Backends and what else is asked for: what every change runs, and the product of all."""
    return [
        pytest.param(*cell, id=", ".join(cell), marks=[] if cell in default else [pytest.mark.full])
        for cell in itertools.product(BACKENDS, RUNS)
    ]


def reinforce(settings: Mapping[str, Any], base: str, folder: Path, output_dir: Path) -> list[dict[str, Any]]:
    """On a rank: three steps of GRPO or PPO, saved as a run is; the lines of metrics.jsonl."""
    config = StrategyConfig(
        **{
            "lora_rank": 4,
            "engine_type": "hf",
            "verify_weights": "full",
            "pretrain": base,
            "prompt_data": str(folder / "prompts.jsonl"),
            "output_dir": str(output_dir),
            "reward": "odd_reward:odd",
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 4,
            "train_batch_size": 8,
            "micro_train_batch_size": 4,
            "prompt_max_len": 24,
            "generate_max_len": 12,
            "actor_learning_rate": 1e-2,
            "lr_warmup_ratio": 0.0,
            "use_kl_loss": True,
            "num_episodes": 3,
            "max_steps": 3,
            "use_tensorboard": False,
            **settings,
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(SPMDPPOTrainer, "_plot", lambda self: None)  # curves take longer than these steps
        train(config)
    return read_metrics(output_dir / METRICS_FILE)


@pytest.mark.parametrize(("backend", "beside"), cells(DEFAULT_RUNS))
def test_the_engine_is_fed_the_merged_weights_and_the_kl_is_to_the_base(
    ranks: RankPool, base: str, tmp_path: Path, backend: str, beside: str
) -> None:
    asked = RUNS[beside]
    (tmp_path / "odd_reward.py").write_text(REWARD)
    questions = [{"input": f"count the stones : {i}", "label": str(i)} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    lines = ranks.run(reinforce, {**BACKENDS[backend], **asked}, base, tmp_path, tmp_path / "run")[0]
    assert [line["weight_version"] for line in lines] == [2, 3, 4]
    drift = 0.05 if "bf16" in asked else 1e-5  # what rounding to bf16 does to a logprob of this model, on average
    assert all(line["logprob_drift"] < drift for line in lines), "the engine samples from the adapted model"
    assert lines[0]["kl"] < lines[1]["kl"] < lines[2]["kl"], "the policy leaves the model that it was made from"
    assert "critic_loss" not in lines[0] or all(line["critic_grad_norm"] > 0 for line in lines)
    saved = says(tmp_path / "run" / "model")
    rounding = rounding_of(tmp_path / "run" / "model") if "bf16" in asked else 2e-5
    assert (saved - says(base, tmp_path / "run" / "adapter")).abs().max() < rounding
    assert (saved - says(base)).abs().max() > 1.5 * rounding
    if "enable_ema" in asked:
        average = says(tmp_path / "run" / "model_ema")
        assert 2 * rounding < (average - says(base)).abs().max() < 2 * (saved - says(base)).abs().max()
