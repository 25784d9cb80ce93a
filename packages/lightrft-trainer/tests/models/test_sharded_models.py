"""Actors, critics and reward models under a backend that shards them: the same numbers as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.models import Actor, Critic, RewardModel, pad_rows
from lightrft.strategy import FakeStrategy, StrategyConfig, get_strategy
from lightrft.testing.tiny_models import tiny_config, tiny_model

ROWS = pad_rows([[5, 6, 7], [8, 9, 10, 11, 12], [4]], [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2]], pad_token_id=0)
RANKS = 2


def config(ranks: int, **settings: Any) -> StrategyConfig:
    """One optimizer step a backward pass; every rank brings the same rows, so that their mean is that of one."""
    rows = len(ROWS.sequences)
    return StrategyConfig(
        engine_type="hf",
        actor_learning_rate=1e-2,
        micro_train_batch_size=rows,
        train_batch_size=rows * ranks,
        **settings,
    )


def two_steps(strategy: Any, kind: str, **options: Any) -> list[torch.Tensor]:
    """Response logprobs before and after two updates that make the responses likelier."""
    actor = strategy.prepare(Actor(tiny_model(kind), gradient_checkpointing=True, **options).train())
    optimizer = strategy.create_optimizer(actor)
    found = []
    for _ in range(2):
        logprobs, entropies = actor(
            ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, temperature=0.8, return_entropy=True
        )
        found.append(logprobs.detach().clone())
        loss = -(logprobs.sum() + 0.1 * entropies.sum()) / int(ROWS.response_mask.sum())
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, None)
    with torch.no_grad():
        found.append(actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, temperature=0.8))
    return found


def two_sharded_steps(kind: str, **options: Any) -> list[torch.Tensor]:
    return two_steps(get_strategy(config(RANKS, fsdp=True)), kind, **options)


def heads(strategy: Any) -> list[torch.Tensor]:
    """What a critic and a reward model say of the rows."""
    torch.manual_seed(0)
    critic, scorer = Critic(tiny_config("qwen2")), RewardModel(tiny_config("qwen2"))
    torch.nn.init.normal_(critic.value_head.weight)
    with torch.no_grad():
        critic, scorer = strategy.prepare(critic.eval(), scorer.eval())
        return [
            critic(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask),
            scorer(ROWS.sequences, ROWS.attention_mask),
        ]


def save_heads(folder: Path) -> list[torch.Tensor]:
    """Train a critic for a step, save it and a reward model, and say what both say of the rows."""
    strategy = get_strategy(config(RANKS, fsdp=True))
    torch.manual_seed(1)
    critic = strategy.prepare(Critic(tiny_config("qwen2")))
    optimizer = strategy.create_optimizer(critic)
    strategy.backward((critic(ROWS.sequences, ROWS.attention_mask) - 1).square().mean(), critic, optimizer)
    strategy.optimizer_step(optimizer, critic, None)
    scorer = strategy.prepare_model(RewardModel(tiny_config("qwen2")))
    strategy.save_model(critic, None, folder / "critic", bucket_bytes=2**14)
    strategy.save_model(scorer, None, folder / "scorer", bucket_bytes=2**14)
    with torch.no_grad():
        return [critic.eval()(ROWS.sequences, ROWS.attention_mask), scorer.eval()(ROWS.sequences, ROWS.attention_mask)]


def read_heads(folder: Path, meta_init: bool) -> list[torch.Tensor]:
    strategy = get_strategy(config(RANKS, fsdp=True))
    with strategy.init_model_context(meta_init=meta_init):
        critic, scorer = Critic(folder / "critic"), RewardModel(folder / "scorer")
    with torch.no_grad():
        critic, scorer = strategy.prepare(critic.eval(), scorer.eval())
        return [critic(ROWS.sequences, ROWS.attention_mask), scorer(ROWS.sequences, ROWS.attention_mask)]


def sharded_heads() -> list[torch.Tensor]:
    return heads(get_strategy(config(RANKS, fsdp=True)))


@pytest.mark.parametrize("options", [{}, {"fused_linear_logprob": True, "chunk_size": 3}], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "qwen3_moe"])
def test_a_sharded_actor_learns_as_in_one_process(ranks: Any, kind: str, options: dict[str, Any]) -> None:
    expected = two_steps(FakeStrategy(args=config(1)), kind, **options)
    assert expected[2][ROWS.response_mask].mean() > expected[0][ROWS.response_mask].mean() + 0.1
    for found in ranks.run(two_sharded_steps, kind, **options):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()


def test_sharded_heads_say_the_same(ranks: Any) -> None:
    expected = heads(FakeStrategy(args=config(1)))
    for found in ranks.run(sharded_heads):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_saved_heads_are_read_back(ranks: Any, tmp_path: Path) -> None:
    values, scores = ranks.run(save_heads, tmp_path)[0]
    assert (values != 0).any()
    alone = Critic(tmp_path / "critic").eval(), RewardModel(tmp_path / "scorer").eval()
    with torch.no_grad():
        read = [model(ROWS.sequences, ROWS.attention_mask) for model in alone]
    for found in (read, *ranks.run(read_heads, tmp_path, False), *ranks.run(read_heads, tmp_path, True)):
        assert torch.allclose(found[0], values, atol=1e-6)
        assert torch.allclose(found[1], scores, atol=1e-6)
