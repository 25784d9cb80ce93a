"""LoRA on every backend: the trajectory of one process, the weights that peft merges, checkpoints that go anywhere.

uv run nox -s integration -- -k lora
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lightrft.models import Actor, pad_rows
from lightrft.models.lora import WithoutAdapters, add_adapters, save_adapter
from lightrft.strategy import FakeStrategy, StrategyConfig, get_strategy
from lightrft.strategy.hub_layout import HubLayout, hub_sources
from lightrft.strategy.weights import UpdatePlan
from lightrft.testing import (
    Deviation,
    RankPool,
    Recipe,
    compare,
    noise_floor,
    reference_trajectory,
    run_trajectory,
    save_tiny_model,
    tiny_model,
)
from lightrft.trainer.metrics import METRICS_FILE, read_metrics
from lightrft.trainer.run import build

BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "FSDP2": {"fsdp": True},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
}
Tensors = dict[str, torch.Tensor]


def moved(model: nn.Module) -> None:
    """Give every adapter the same values wherever it is made; B is not 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


# ---- trajectory ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class AdaptedRecipe(Recipe):
    """Trains adapters beside frozen weights."""

    def models(self) -> dict[str, nn.Module]:
        made = super().models()
        for model in made.values():
            add_adapters(model, "generator", rank=4)
            moved(model)
        return made


RECIPE = AdaptedRecipe(steps=10, accumulation=2)


def follow(settings: Mapping[str, Any]) -> Any:
    """On a rank."""
    return run_trajectory(get_strategy(StrategyConfig(**RECIPE.settings(2), **settings)), RECIPE)


def other_order() -> Deviation:
    """One process from itself when its linear layers sum input gradients in two halves.

    Under ZeRO 3 DeepSpeed computes linear layers by a function of its own, and no regrouping of rows shows what that
    rounds otherwise.
    """
    linear, whole = functional.linear, replace(RECIPE, accumulation=1)

    def halves(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        biases = (None, None) if bias is None else bias.chunk(2)
        return torch.cat([linear(inputs, *part) for part in zip(weight.chunk(2), biases, strict=True)], dim=-1)

    reference = reference_trajectory(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", halves)
        return compare(run_trajectory(FakeStrategy(**whole.settings(1)), whole), reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trajectory_is_that_of_one_process(ranks: RankPool, backend: str) -> None:
    trajectory, reference = ranks.run(follow, BACKENDS[backend])[0], reference_trajectory(RECIPE)
    deviation = compare(trajectory, reference)
    assert deviation.within(other_order(), times=1) == []
    assert backend == "ZeRO 3" or deviation.within(noise_floor(RECIPE)) == []
    assert all("lora_" in name for name in trajectory.first_moments), "nothing else has moments"


# ---- export, files, checkpoints --------------------------------------------------------------------------------------
def prepared(settings: Mapping[str, Any], base: str, values: bool = True) -> tuple[Any, Any, Any]:
    """On a rank: strategy, adapted actor, optimizer."""
    config = StrategyConfig(micro_train_batch_size=1, train_batch_size=2, max_norm=0.5, seed=3, **settings)
    strategy = get_strategy(config)
    actor = Actor(base, lora_rank=4, lora_alpha=6.0)
    if values:
        moved(actor)
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


def train_and_save(settings: Mapping[str, Any], base: str, folder: Path) -> dict[str, Any]:
    """On a rank: three steps, everything that can be said and saved of them, and two more."""
    strategy, actor, optimizer = prepared(settings, base)
    step(strategy, actor, optimizer, range(3))
    found: dict[str, Any] = {
        "state": {item.name: item.weight for item in strategy.iter_state(actor)},
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
def runs(ranks: RankPool, base: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every rank of every backend found."""
    return {name: ranks.run(train_and_save, settings, base, folder / name) for name, settings in BACKENDS.items()}


def merged_by_peft(state: Tensors, base: str) -> Tensors:
    """Hub names and values after peft's own merge, from the parameters of an adapted actor."""
    actor = Actor(base, lora_rank=4, lora_alpha=6.0)
    actor.load_state_dict(state)
    for module in actor.modules():
        if isinstance(module, LoraLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in hub_sources(actor)}
    layout = HubLayout(tiny_model("qwen2"))
    return {hub.name: plain[f"model.{hub.source}"].detach() for hub in layout.by_name.values()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_exports_what_peft_merges(runs: Any, base: str, backend: str) -> None:
    for found in runs[backend]:
        expected = merged_by_peft(found["state"], base)
        assert found["merged"].keys() == expected.keys()
        assert all(torch.allclose(found["merged"][n], expected[n], rtol=0, atol=1e-6) for n in expected)
        assert all(torch.equal(found["rounded"][n], found["merged"][n].bfloat16()) for n in expected), "rounded once"


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_its_adapters_the_actor_is_its_own_reference(runs: Any, base: str, backend: str) -> None:
    with torch.no_grad():
        plain = Actor(base)(*ASKED)
    for found in runs[backend]:
        assert torch.allclose(found["reference"], plain, atol=1e-5)
        assert not torch.allclose(found["logprobs"], plain, atol=1e-2), "the adapters are back"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_saved_model_and_adapter_say_what_the_actor_says(runs: Any, base: str, folder: Path, backend: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder / backend / "model", dtype=torch.float32)
    on_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(on_base, str(folder / backend / "adapter"))
    for model in (plain, peft):
        with torch.no_grad():
            said = Actor(model)(*ASKED)
        assert torch.allclose(said, runs[backend][0]["logprobs"], atol=2e-5)


@pytest.mark.parametrize("after", BACKENDS)
@pytest.mark.parametrize("before", BACKENDS)
def test_training_goes_on_from_any_backends_checkpoint(
    ranks: RankPool, runs: Any, base: str, folder: Path, before: str, after: str
) -> None:
    expected, found = runs[before][0], ranks.run(go_on, BACKENDS[after], base, folder / before / "ckpt")[0]
    exact = before == after
    for name, value in expected["later"].items():
        assert torch.equal(found[name], value) if exact else torch.allclose(found[name], value, rtol=0, atol=1e-5), name


# ---- the trainer -----------------------------------------------------------------------------------------------------
REWARD = """
def odd(prompts, responses, labels, **extras):
    return [sum(ord(c) % 2 for c in response) / max(1, len(response)) for response in responses]
"""


def reinforce(settings: Mapping[str, Any], base: str, folder: Path, output_dir: Path) -> list[dict[str, Any]]:
    """On a rank: three steps of GRPO; the lines of metrics.jsonl."""
    config = StrategyConfig(
        **settings,
        lora_rank=4,
        engine_type="hf",
        verify_weights="full",
        pretrain=base,
        prompt_data=str(folder / "prompts.jsonl"),
        output_dir=str(output_dir),
        reward="odd_reward:odd",
        rollout_batch_size=4,
        n_samples_per_prompt=4,
        train_batch_size=8,
        micro_train_batch_size=4,
        prompt_max_len=24,
        generate_max_len=12,
        actor_learning_rate=1e-2,
        lr_warmup_ratio=0.0,
        use_kl_loss=True,
        num_episodes=3,
        max_steps=3,
        use_tensorboard=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        trainer, loader, _ = build(get_strategy(config), config, output_dir, multimodal=False)
        trainer.fit(config, loader)
    return read_metrics(output_dir / METRICS_FILE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_is_fed_the_merged_weights_and_the_kl_is_to_the_base(
    ranks: RankPool, base: str, tmp_path: Path, backend: str
) -> None:
    (tmp_path / "odd_reward.py").write_text(REWARD)
    questions = [{"input": f"count the stones : {i}", "label": str(i)} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    lines = ranks.run(reinforce, BACKENDS[backend], base, tmp_path, tmp_path / "run")[0]
    assert [line["weight_version"] for line in lines] == [2, 3, 4]
    assert all(line["logprob_drift"] < 1e-5 for line in lines), "the engine samples from the adapted model"
    assert lines[0]["kl"] < lines[1]["kl"] < lines[2]["kl"], "the policy leaves the model that it was made from"
