"""Sequences cut over ranks: the numbers of whole ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightrft.models import Actor, ActorVL, Critic, pad_rows
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.testing.tiny_models import tiny_config, tiny_model

ROWS = pad_rows(
    [[5, 6, 7], [8, 9, 10, 11, 12], [4], [3, 3, 3, 9, 9, 8]],
    [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2], [7, 8, 9, 7, 8, 9, 7, 8, 9, 10, 2]],  # 17 columns: no rank's multiple
    pad_token_id=0,
)
RANKS = 2


def numbers(module: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model says of the rows, and this rank's part of the gradient of a weighted sum of it."""
    values = module(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    (values * weights).sum().backward()
    return values.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def build(kind: str, **options: Any) -> Any:
    if kind != "critic":
        wide: Any = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2} if "_wide" in kind else {}
        return Actor(tiny_model(kind.removesuffix("_wide"), **wide), **options).train()
    torch.manual_seed(0)
    critic = Critic(tiny_config("qwen2"), **options)
    torch.nn.init.normal_(critic.value_head.weight)
    return critic.train()


def strategy_of(ranks: int) -> Any:
    return get_strategy(StrategyConfig(fsdp=True, engine_type="hf", sp_size=ranks, train_batch_size=1))


def shared(kinds: list[str], ranks: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Values, and gradients averaged over ranks as a backend does, of each kind, padded and packed in turn."""
    strategy, found = strategy_of(ranks), []
    for kind in kinds:
        for packing in (False, True):
            module = build(
                kind,
                packing_samples=packing,
                sequence_group=strategy.sequence_group,
                gradient_checkpointing=True,
            )
            copied = copy.deepcopy(module)  # an average of it talks to the same ranks
            values, gradients = numbers(copied)
            found.append((values, strategy.all_reduce(gradients, "mean")))
    return found


def seen_columns(ranks: int) -> list[tuple[int, ...]]:
    """Shapes of the hidden states that a layer of this rank works on."""
    actor, shapes = build("qwen2", sequence_group=strategy_of(ranks).sequence_group), []
    actor.model.model.layers[0].register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    return shapes


def beside_another(ranks: int) -> tuple[Tensor, Tensor]:
    """Of packed rows, what is said before and after the second one has become another."""
    actor = build("qwen2", packing_samples=True, sequence_group=strategy_of(ranks).sequence_group)
    other = ROWS.sequences.clone()
    other[1, :10] = torch.arange(60, 70)
    with torch.no_grad():
        before, after = (actor(each, ROWS.attention_mask, ROWS.response_mask) for each in (ROWS.sequences, other))
    return before, after


def refused(kind: str, ranks: int, **options: Any) -> str:
    actor = ActorVL if kind == "qwen2_vl" else Actor
    with pytest.raises(ValueError) as error:
        actor(tiny_model(kind, **options), sequence_group=strategy_of(ranks).sequence_group)
    return str(error.value)


def assert_shared_equals_whole(pool: Any, kinds: list[str]) -> None:
    for found in pool.run(shared, kinds, pool.world_size):
        for kind, padded, packed in zip(kinds, found[0::2], found[1::2], strict=True):
            expected, gradients = numbers(build(kind))
            for values, averaged in (padded, packed):
                assert torch.allclose(values, expected, atol=5e-6), (kind, (values - expected).abs().max())
                assert averaged.keys() == gradients.keys()
                for name, gradient in gradients.items():
                    limit = 1e-5 * max(1.0, float(gradient.abs().max()))
                    assert (averaged[name] - gradient).abs().max() <= limit, (kind, name)


def test_two_ranks_say_and_learn_of_a_sequence_what_one_does(ranks: Any):
    # One key head for two query heads, experts, windows that reach over the cut, a value head.
    assert_shared_equals_whole(ranks, ["qwen2", "qwen3_moe", "qwen2_sliding", "critic"])


@pytest.mark.full
def test_four_ranks_say_and_learn_of_a_sequence_what_one_does(rank_pools: Any):
    assert_shared_equals_whole(rank_pools(4), ["qwen2_wide", "qwen3_moe_wide"])


def test_each_rank_works_on_its_part_of_a_sequence(ranks: Any):
    assert ranks.run(seen_columns, RANKS) == [[(4, 9, 64)]] * RANKS


def test_a_packed_sample_moves_none_of_its_neighbours_over_ranks(ranks: Any):
    for before, after in ranks.run(beside_another, RANKS):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not torch.equal(before[1], after[1])


def test_heads_that_cannot_be_shared_are_refused_with_the_sizes_that_can(ranks: Any):
    for text in ranks.run(refused, "qwen2", RANKS, hidden_size=96, num_attention_heads=3, num_key_value_heads=3):
        assert text == (
            "--sp_size 2: Qwen2ForCausalLM has 3 attention heads, which 2 ranks cannot share; possible are 1, 3"
        )


def test_images_are_refused(ranks: Any):
    for text in ranks.run(refused, "qwen2_vl", RANKS):
        assert text.startswith("--sp_size 2: Qwen2VLForConditionalGeneration takes images")
