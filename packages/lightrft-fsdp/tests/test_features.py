"""What FSDP2 adds or could get wrong: precision, offload, subgroups, actors, mixed batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from lightrft.fsdp import FSDPV2Strategy, ShardedAdamW, sharding
from lightrft.fsdp.shards import local
from lightrft.strategy import FakeStrategy, StrategyConfig, get_strategy
from lightrft.testing import tiny_model
from lightrft.testing.tiny_models import IMAGE_PAD, VISION_START

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "dist_timeout": 60.0,
    "max_norm": 0.5,
    "micro_train_batch_size": 2,
    "train_batch_size": 4,
    "adam_eps": 1e-4,
}


def rows(step: int, count: int = 4) -> torch.Tensor:
    return torch.randint(7, 512, (count, 8), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
    return model(input_ids=part, labels=part).loss


def train(strategy: Any, model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    """Norms of some steps; the ranks share each batch out."""
    norms = []
    for step in steps:
        mine = rows(step).chunk(strategy.world_size)[strategy.rank if strategy.distributed else 0]
        for part in mine.split(strategy.config.micro_train_batch_size):
            strategy.backward(loss_of(model, part), model, optimizer)
            result = strategy.optimizer_step(optimizer, model, None)
        norms.append(result.grad_norm)
    return norms


def weights(strategy: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    return {item.name: item.weight for item in strategy.iter_state(model)}


def reference(kind: str = "qwen2_tied", steps: int = 3) -> tuple[dict[str, torch.Tensor], list[float]]:
    strategy = FakeStrategy(**{**SETTINGS, "micro_train_batch_size": 4})
    model = strategy.prepare(tiny_model(kind))
    norms = train(strategy, model, strategy.create_optimizer(model, lr=1e-3), range(steps))
    return weights(strategy, model), norms


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- precision and offload -------------------------------------------------------------------------------------------
def movement(settings: dict[str, Any]) -> tuple[float, list[float]]:
    """How far three steps lead from where fp32 leads, relative to the way; and the gradient norms.

    Both begin at weights that every dtype holds exactly.
    """
    strategies = FSDPV2Strategy(**{**SETTINGS, **settings}), FakeStrategy(**{**SETTINGS, "micro_train_batch_size": 4})
    ways, norms = [], []
    for strategy in strategies:
        model = tiny_model("qwen2_tied")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
        model = strategy.prepare(model)
        optimizer = strategy.create_optimizer(model, lr=1e-3)
        if strategy.config.fp16:  # as it is once the first overflows have passed
            strategy.record(model).loss_scale.value = 2.0**10
        before = weights(strategy, model)
        norms.append(train(strategy, model, optimizer, range(3)))
        after = {item.name: item.weight for item in strategy.iter_state(model, optimizer)}
        ways.append(torch.cat([(after[name].float() - before[name].float()).flatten() for name in before]))
        if strategy is strategies[0]:
            half = getattr(torch, strategy.config.dtype_name) if strategy.config.use_mp_opt else torch.float32
            assert {parameter.dtype for parameter in model.parameters()} == {half}
            for state in optimizer.state.values():
                assert {state[kind].dtype for kind in ("exp_avg", "exp_avg_sq")} == {torch.float32}
                assert ("master" in state) == strategy.config.use_mp_opt
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    return ((ways[0] - ways[1]).norm() / ways[1].norm()).item(), norms[0]


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 1e-5),
        ({"adam_offload": True}, 1e-5),
        ({"fsdp_cpu_offload": True}, 1e-5),
        ({"bf16": True}, 0.1),
        ({"fp16": True}, 0.02),
        ({"bf16": True, "use_mp_opt": True}, 0.1),
        ({"fp16": True, "use_mp_opt": True}, 0.02),
        ({"bf16": True, "use_mp_opt": True, "fsdp_cpu_offload": True}, 0.1),
        ({"bf16": True, "micro_train_batch_size": 1, "use_mp_opt": True}, 0.1),
    ],
    ids=lambda value: "-".join(value) or "fp32" if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_follows_fp32_as_far_as_the_precision_allows(
    rank_pools: Any, world_size: int, settings: dict[str, Any], bound: float
) -> None:
    results = rank_pools(world_size).run(movement, settings)
    assert all(norms == results[0][1] for _, norms in results), "the norm is the same on every rank"
    assert max(error for error, _ in results) <= bound


def sixteen_bit_gradients_add_up_in_fp32() -> None:
    strategy = FSDPV2Strategy(**{**SETTINGS, "micro_train_batch_size": 1, "bf16": True, "use_mp_opt": True})
    model = strategy.prepare(tiny_model())
    optimizer = strategy.create_optimizer(model)
    mine = rows(0).chunk(2)[strategy.rank]
    total: dict[str, torch.Tensor] = {}
    for part in mine.split(1):
        alone = FSDPV2Strategy(**{**SETTINGS, "micro_train_batch_size": 2, "bf16": True})
        other = alone.prepare(tiny_model())
        alone.backward(loss_of(other, part) / 2, other, alone.create_optimizer(other))
        for name, parameter in other.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, 0) + local(parameter.grad).to(torch.bfloat16).float()
        strategy.backward(loss_of(model, part), model, optimizer)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(local(parameter.grad), total[name]), name


def test_micro_batches_of_16_bit_parameters_add_up_in_fp32(ranks: Any) -> None:
    ranks.run(sixteen_bit_gradients_add_up_in_fp32)


def overflow() -> None:
    """fp16 gradients that overflow halve the scale, skip the step on every rank, and leave the weights alone."""
    strategy = FSDPV2Strategy(**{**SETTINGS, "fp16": True})
    model = strategy.prepare(tiny_model())
    optimizer = strategy.create_optimizer(model)
    record = strategy.record(model)
    before, scale = weights(strategy, model), record.loss_scale.value
    factor = 1e6 if strategy.rank == 1 else 1.0
    strategy.backward(loss_of(model, rows(0).chunk(2)[strategy.rank]) * factor, model, optimizer)
    result = strategy.optimizer_step(optimizer, model, None)
    assert result.skipped
    assert record.loss_scale.value == scale / 2
    for name, value in weights(strategy, model).items():
        assert torch.equal(value, before[name]), name
    assert train(strategy, model, optimizer, range(1)) == pytest.approx(reference("qwen2", 1)[1], rel=0.02)


def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all(ranks: Any) -> None:
    ranks.run(overflow)


def what_offloads() -> None:
    """On a CPU everything is on the host, so what each flag asks for is looked at."""
    for flag in (None, "adam_offload", "fsdp_cpu_offload"):
        strategy = FSDPV2Strategy(**SETTINGS, **({flag: True} if flag else {}))
        with mock.patch.object(sharding, "fully_shard", wraps=sharding.fully_shard) as shard:
            model, _ = strategy.prepare(tiny_model()), strategy.prepare_model(tiny_model(seed=1))
        kinds = {type(call.kwargs["offload_policy"]) for call in shard.call_args_list}
        assert kinds == {CPUOffloadPolicy if flag == "fsdp_cpu_offload" else OffloadPolicy}, flag
        optimizer = strategy.create_optimizer(model)
        assert isinstance(optimizer, ShardedAdamW)
        assert optimizer.on_host == (flag is not None)
        train(strategy, model, optimizer, range(1))
        with mock.patch.object(strategy, "move") as move:
            strategy.maybe_load_optimizer(optimizer)
            strategy.reload_model(model)
        moved = [call.args[0] for call in move.call_args_list]
        homes = {None: [optimizer, model], "adam_offload": [model], "fsdp_cpu_offload": []}
        assert moved == homes[flag], "what lives on the host is not brought to the device"


def test_each_flag_offloads_what_it_says(ranks: Any) -> None:
    ranks.run(what_offloads)


def whereabouts(settings: dict[str, Any]) -> dict[str, set[str]]:
    """On which kinds of device two steps leave parameters, gradients and the optimizer's states."""
    strategy = FSDPV2Strategy(**SETTINGS, **settings)
    model = strategy.prepare(tiny_model())
    optimizer = strategy.create_optimizer(model)
    seen: dict[str, set[str]] = {"parameters": set(), "gradients": set(), "states": set()}
    for step in range(2):
        for part in rows(step).split(strategy.config.micro_train_batch_size):
            strategy.backward(loss_of(model, part.to(strategy.device)), model, optimizer)
            for parameter in model.parameters():
                assert parameter.grad is not None
                seen["gradients"].add(parameter.grad.device.type)
            strategy.optimizer_step(optimizer, model, None)
        seen["parameters"] |= {parameter.device.type for parameter in model.parameters()}
        seen["states"] |= {value.device.type for state in optimizer.state.values() for value in state.values()}
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("settings", "on_the_host"),
    [
        ({}, set()),
        ({"adam_offload": True}, {"states"}),
        ({"bf16": True, "use_mp_opt": True, "adam_offload": True}, {"states"}),
        ({"fsdp_cpu_offload": True}, {"parameters", "gradients", "states"}),
        ({"bf16": True, "use_mp_opt": True, "fsdp_cpu_offload": True}, {"parameters", "gradients", "states"}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_between_steps_what_is_offloaded_is_on_the_host(
    rank_pools: Any, settings: dict[str, Any], on_the_host: set[str]
) -> None:
    (seen,) = rank_pools(1).run(whereabouts, settings)
    device = torch.accelerator.current_accelerator()
    assert device is not None
    assert seen == {what: {"cpu" if what in on_the_host else device.type} for what in seen}


# ---- subgroups -------------------------------------------------------------------------------------------------------
def replicated_training(micro: int) -> None:
    """shard_size=1 with two ranks: each holds everything, gradients are averaged."""
    strategy = FSDPV2Strategy(**{**SETTINGS, "micro_train_batch_size": micro})
    model = strategy.prepare_model(tiny_model("qwen2_tied"), shard_size=1, is_training=True)
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    norms = train(strategy, model, optimizer, range(3))
    expected, expected_norms = reference()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_close(weights(strategy, model), expected, 1e-6)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_model_that_every_rank_holds_trains_as_one(ranks: Any, micro: int) -> None:
    ranks.run(replicated_training, micro)


def frozen_sizes() -> list[int]:
    strategy = FSDPV2Strategy(**SETTINGS)
    models = [strategy.prepare_model(tiny_model(), shard_size=shard_size) for shard_size in (1, 8, None)]
    for flag in (1, None):
        strategy = FSDPV2Strategy(**SETTINGS, initial_model_shard_size=flag)
        *_, reference = strategy.prepare_models_and_optimizers(tiny_model(), None, None, tiny_model(), None, 1)
        models.append(reference)
    assert not any(parameter.requires_grad for model in models for parameter in model.parameters())
    return [sum(local(parameter).numel() for parameter in model.parameters()) for model in models]


def test_a_frozen_model_takes_no_more_ranks_than_there_are(ranks: Any) -> None:
    total = sum(parameter.numel() for parameter in tiny_model().parameters())
    for one, eight, every, *reference in ranks.run(frozen_sizes):
        assert one == total
        assert eight == every < total * 0.51
        assert reference == [one, every], "--initial_model_shard_size decides"


def four_ranks_in_pairs() -> None:
    strategy = FSDPV2Strategy(**{**SETTINGS, "micro_train_batch_size": 1})
    plain = tiny_model("qwen2_tied")
    frozen = strategy.prepare_model(copy.deepcopy(plain), shard_size=2)
    with torch.no_grad():
        torch.testing.assert_close(
            frozen(input_ids=rows(0)).logits, plain(input_ids=rows(0)).logits, atol=1e-5, rtol=1e-5
        )
    model = strategy.prepare_model(plain, shard_size=2, is_training=True)
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    norms = train(strategy, model, optimizer, range(3))
    expected, expected_norms = reference()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_close(weights(strategy, model), expected, 1e-6)


@pytest.mark.full
def test_four_ranks_shard_in_pairs_and_replicate_across(rank_pools: Any) -> None:
    rank_pools(4).run(four_ranks_in_pairs)


# ---- shards and gathered parameters ----------------------------------------------------------------------------------
def forward_between_backward_and_step(no_grad: bool) -> None:
    """A scoring pass before the step must not hide gradients, nor make the next forward see old weights."""
    strategy = FSDPV2Strategy(**SETTINGS)
    model = strategy.prepare(tiny_model("qwen2_tied"))
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    norms = []
    for step in range(3):
        part = rows(step).chunk(2)[strategy.rank]
        strategy.backward(loss_of(model, part), model, optimizer)
        with torch.set_grad_enabled(not no_grad):
            loss_of(model, part)
        norms.append(strategy.optimizer_step(optimizer, model, None).grad_norm)
    expected, expected_norms = reference()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_close(weights(strategy, model), expected, 1e-6)


@pytest.mark.parametrize("no_grad", [True, False])
def test_a_forward_pass_between_backward_and_step_changes_nothing(ranks: Any, no_grad: bool) -> None:
    ranks.run(forward_between_backward_and_step, no_grad)


def shards_after_scoring() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    for model in (strategy.prepare(tiny_model()), strategy.prepare_model(tiny_model())):
        with torch.no_grad():
            model(input_ids=rows(0))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_scoring_leaves_shards_behind(ranks: Any) -> None:
    ranks.run(shards_after_scoring)


def averaging_after_a_forward_pass() -> None:
    """The average ran before; its next forward pass must see the new values."""
    strategy = FSDPV2Strategy(**SETTINGS)
    model, average = strategy.prepare(tiny_model()), strategy.prepare_model(tiny_model())
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    with torch.no_grad():
        average(input_ids=rows(0))
        train_before = weights(strategy, model)
        with torch.enable_grad():
            train(strategy, model, optimizer, range(1))
        strategy.moving_average(model, average, beta=0.0)
        torch.testing.assert_close(average(input_ids=rows(0)).logits, model(input_ids=rows(0)).logits)
    assert any(not torch.equal(value, train_before[name]) for name, value in weights(strategy, average).items())


def test_the_moving_average_is_seen_by_the_next_forward_pass(ranks: Any) -> None:
    ranks.run(averaging_after_a_forward_pass)


def averaging_unlike_models() -> str:
    strategy = FSDPV2Strategy(**SETTINGS)
    model, average = strategy.prepare(tiny_model()), strategy.prepare_model(tiny_model(), shard_size=1)
    with pytest.raises(ValueError, match="sharded differently") as caught:
        strategy.moving_average(model, average)
    return str(caught.value)


def test_models_that_are_cut_otherwise_cannot_be_averaged(ranks: Any) -> None:
    assert "prepare_model(ema)" in ranks.run(averaging_unlike_models)[0]


class Actor(nn.Module):
    """A transformers model with a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(512, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(input_ids=input_ids).logits).mean()


def inner_model_first() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    plain = Actor(tiny_model("qwen2_tied"))
    actor = strategy.prepare(copy.deepcopy(plain))
    optimizer = strategy.create_optimizer(actor)
    with torch.no_grad():
        for _ in range(2):
            found = actor.model(input_ids=rows(0)).logits
            torch.testing.assert_close(found, plain.model(input_ids=rows(0)).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(actor(rows(0)), plain(rows(0)), atol=1e-5, rtol=1e-5)
        tokens = actor.model.generate(rows(0)[:1], max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, plain.model.generate(rows(0)[:1], max_new_tokens=3, do_sample=False))
    strategy.backward(actor(rows(0)), actor, optimizer)
    assert strategy.optimizer_step(optimizer, actor, None).stepped


def test_the_model_inside_an_actor_can_run_before_the_actor_does(ranks: Any) -> None:
    ranks.run(inner_model_first)


def checkpointed() -> None:
    strategy = FSDPV2Strategy(**SETTINGS)
    model = tiny_model("qwen2_tied")
    model.gradient_checkpointing_enable()
    model = strategy.prepare(model.train())
    norms = train(strategy, model, strategy.create_optimizer(model, lr=1e-3), range(3))
    expected, expected_norms = reference()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_close(weights(strategy, model), expected, 1e-6)


def test_gradient_checkpointing_changes_nothing(ranks: Any) -> None:
    ranks.run(checkpointed)


def embedding_of_its_own() -> None:
    sharding.LARGE_EMBEDDING, usual = 1, sharding.LARGE_EMBEDDING
    try:
        strategy = FSDPV2Strategy(**{**SETTINGS, "micro_train_batch_size": 1})
        model = strategy.prepare(tiny_model("qwen2"))
    finally:
        sharding.LARGE_EMBEDDING = usual
    assert type(model.get_input_embeddings()).__name__ == "FSDPEmbedding"  # type: ignore[operator]
    norms = train(strategy, model, strategy.create_optimizer(model, lr=1e-3), range(3))
    expected, expected_norms = reference("qwen2")
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_close(weights(strategy, model), expected, 1e-6)


def test_an_embedding_that_is_gathered_for_the_forward_pass_alone_trains(ranks: Any) -> None:
    ranks.run(embedding_of_its_own)


# ---- mixed batches ---------------------------------------------------------------------------------------------------
def image_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """One prompt with a 4x4-patch image, which becomes 4 tokens."""
    vision = model.config.vision_config  # type: ignore[union-attr]
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(16, patch, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[9, VISION_START, *[IMAGE_PAD] * 4, 10, 11]])
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_PAD).long(),
    }


def text_batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(7, 15)[None]
    return {"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros_like(ids)}


def one_rank_has_images(images_on: int) -> None:
    settings = {**SETTINGS, "micro_train_batch_size": 1, "train_batch_size": 2}
    strategy = FSDPV2Strategy(**settings, mixed_mm_data=True)
    plain = tiny_model("qwen2_vl")
    batches = [image_batch(plain) if rank == images_on else text_batch() for rank in range(2)]
    model = strategy.prepare(copy.deepcopy(plain))
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    fake = FakeStrategy(**settings)
    single = fake.prepare(plain)
    single_optimizer = fake.create_optimizer(single, lr=1e-3)
    for _ in range(2):
        strategy.backward(model(**batches[strategy.rank]).loss, model, optimizer)
        result = strategy.optimizer_step(optimizer, model, None)
        for batch in batches:
            fake.backward(single(**batch).loss, single, single_optimizer)
            expected = fake.optimizer_step(single_optimizer, single, None)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert_close(weights(strategy, model), weights(fake, single), 2e-6)
    with torch.no_grad():
        model(**batches[strategy.rank])


@pytest.mark.parametrize("images_on", [0, 1])
def test_a_rank_without_images_keeps_step_with_one_that_has_some(ranks: Any, images_on: int) -> None:
    ranks.run(one_rank_has_images, images_on)


class RoutedBlock(nn.Module):
    """Experts in a list, of which a rank's batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return x + self.experts[expert](x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([RoutedBlock(), RoutedBlock()])

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, expert)
        return x.square().mean()


def ranks_use_different_experts() -> None:
    settings = {**SETTINGS, "micro_train_batch_size": 1, "train_batch_size": 2}
    strategy, fake = FSDPV2Strategy(**settings), FakeStrategy(**settings)
    strategy.setup_distributed()
    torch.manual_seed(0)
    plain = Routed()
    model = strategy.prepare(copy.deepcopy(plain))
    optimizer = strategy.create_optimizer(model)
    fake.prepare(plain)
    plain_optimizer = fake.create_optimizer(plain)
    x = torch.ones(2, 4)
    strategy.backward(model(x, strategy.rank), model, optimizer)
    result = strategy.optimizer_step(optimizer, model, None)
    for expert in range(2):
        fake.backward(plain(x, expert), plain, plain_optimizer)
        expected = fake.optimizer_step(plain_optimizer, plain, None)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_ranks_whose_batches_use_different_experts_keep_step(ranks: Any) -> None:
    ranks.run(ranks_use_different_experts)


# ---- the documents' ways in ------------------------------------------------------------------------------------------
def through_the_factory(folder: str) -> None:
    strategy = get_strategy(StrategyConfig(fsdp=True, zero_stage=3, **SETTINGS))
    assert isinstance(strategy, FSDPV2Strategy)
    assert strategy.config.backend == "fsdp"
    actor, critic, reward, initial = strategy.prepare(
        tiny_model(), tiny_model(seed=1), tiny_model(seed=2), tiny_model(seed=3), is_rlhf=True
    )
    optimizer = strategy.create_optimizer(actor)
    critic_optimizer = strategy.create_optimizer(critic)
    train(strategy, actor, optimizer, range(1))
    train(strategy, critic, critic_optimizer, range(1))
    strategy.save_model(actor, None, Path(folder) / "model")
    strategy.save_ckpt(actor, Path(folder) / "checkpoints")
    strategy.moving_average(actor, initial)
    assert reward is not None


def test_the_factory_finds_it_and_everything_documented_is_there(ranks: Any, tmp_path: Path) -> None:
    ranks.run(through_the_factory, str(tmp_path))
