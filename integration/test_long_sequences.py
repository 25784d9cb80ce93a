"""Packing, prompts computed once, fused logprobs and sequence parallelism: each is the plain computation, on every
backend, in any mixture.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.models import Actor, pad_rows
from lightrft.strategy import FakeStrategy, StrategyConfig, get_strategy
from lightrft.testing.strategy_claims.claims import gradients_of
from lightrft.testing.tiny_models import save_tiny_model, set_adapters, tiny_model

RANKS = 2
BACKENDS: dict[str, dict[str, Any]] = {
    "FSDP2": {"fsdp": True},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen2", {}),
    "MoE": ("qwen3_moe", {}),
    "dense, LoRA": ("qwen2", {"lora_rank": 4}),
}
LAYOUTS = ("padded", "packed", "prompts once")
MIXTURES = [
    (layout, fused, sp_size)
    for layout, fused, sp_size in itertools.product(LAYOUTS, (False, True), (1, 2))
    if sp_size == 1 or layout != "prompts once"
]
# Of one another the summation orders differ by this much, relative to the whole gradient's norm.
ROUNDING = 2e-6
# Lengths that no two ranks can share evenly, alone or together. Either data rank has samples of one prompt.
FIRST, SECOND = [5, 6, 7, 8, 9], [3, 3, 3, 9, 8, 7, 6]
TRAINED = [FIRST, SECOND, FIRST, SECOND, FIRST]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2], [50, 51, 52, 53, 54, 55, 56, 57, 58, 2], [60, 2]]
TOKENS = sum(map(len, RESPONSES))


def one_step(
    strategy: Any, model: str, mine: slice, layout: str = "padded", **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's part of the loss, and the whole gradient, of a token mean over all rows."""
    kind, adapters = MODELS[model]
    rows = pad_rows(TRAINED[mine], RESPONSES[mine], pad_token_id=0)
    weights = torch.randn(len(TRAINED), 20, generator=torch.Generator().manual_seed(3))
    options |= {"sequence_group": strategy.sequence_group, "packing_samples": layout == "packed"}
    made = Actor(tiny_model(kind), **adapters, **options).train()
    if layout != "prompts once":
        made.shares_prompts = False
    seen: list[torch.Size] = []
    made.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    passes: list[None] = []
    made.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: passes.append(None))
    given: list[torch.Size] = []
    made.model.get_output_embeddings().register_forward_hook(lambda head, args, output: given.append(output.shape))
    actor = strategy.prepare(set_adapters(made))
    optimizer = strategy.create_optimizer(actor)
    logprobs, entropies = actor(
        rows.sequences, rows.attention_mask, rows.response_mask, temperature=0.8, return_entropy=True
    )
    loss = ((logprobs - 0.1 * entropies) * weights[mine, : logprobs.shape[1]]).sum()
    assert seen[0] == expected_shape(rows.attention_mask, TRAINED[mine], layout, strategy.args.sp_size)
    fused, vocabulary = options.get("fused_linear_logprob", False), made.config.vocab_size
    assert given[0][-1] == (2 if fused else vocabulary), "logits are made where they are not fused, and only there"
    strategy.backward(loss, actor, optimizer, scale=1 / TOKENS)
    assert len(passes) == 1 + options.get("gradient_checkpointing", False), "activations are made again where asked"
    strategy.optimizer_step(optimizer, actor, None)
    return loss.item() / TOKENS, gradients_of(strategy, actor, optimizer)


def expected_shape(mask: torch.Tensor, prompts: list[list[int]], layout: str, sp_size: int) -> tuple[int, int]:
    """Rows and columns that a rank's model is to see: plain would equal plain were the layout passed over."""
    rows, columns = mask.shape
    if layout == "packed":
        rows, columns = 1, int(mask.sum())
    elif layout == "prompts once":
        repeated = sum(len(p) - 1 for p in prompts) - sum({tuple(p): len(p) - 1 for p in prompts}.values())
        rows, columns = 1, int(mask.sum()) - len(prompts) - repeated
    return rows, math.ceil(columns / sp_size)


def settings(ranks: int, sp_size: int, **given: Any) -> StrategyConfig:
    return StrategyConfig(
        engine_type="hf",
        micro_train_batch_size=1,
        train_batch_size=ranks // sp_size,
        sp_size=sp_size,
        max_norm=0.0,
        **given,
    )


def on_ranks(backend: dict[str, Any], model: str, mixtures: list[Any], checkpointing: bool, ranks: int) -> list[Any]:
    """Loss over all rows and gradient of each mixture."""
    found = []
    for layout, fused, sp_size in mixtures:
        strategy = get_strategy(settings(ranks, sp_size, **backend))
        mine = slice(strategy.data_parallel_rank, None, strategy.data_parallel_size)
        options = {"layout": layout, "fused_linear_logprob": fused, "chunk_size": 3}
        loss, gradient = one_step(strategy, model, mine, gradient_checkpointing=checkpointing, **options)
        found.append((strategy.reduce_over_data(loss, "sum"), gradient))
    return found


def distances(found: list[Any], model: str) -> list[tuple[float, float]]:
    """Of each mixture from the plain step in one process: in loss, and in gradient relative to the whole one's norm."""
    loss, gradient = one_step(FakeStrategy(args=settings(1, 1)), model, slice(None))
    norm = torch.stack([part.norm() for part in gradient.values()]).norm()
    return [
        (abs(other - loss), float(max((theirs[n] - gradient[n]).norm() / norm for n in gradient)))
        for other, theirs in found
    ]


def cells() -> list[Any]:
    """Backends and models: what every change runs, and the others."""
    default = set(itertools.product(("FSDP2", "ZeRO 3"), ("dense", "MoE")))
    return [
        pytest.param(*cell, id=", ".join(cell), marks=[] if cell in default else [pytest.mark.full])
        for cell in itertools.product(BACKENDS, MODELS)
    ]


@pytest.mark.parametrize(("backend", "model"), cells())
def test_every_mixture_gives_the_plain_loss_and_gradient(ranks: Any, backend: str, model: str) -> None:
    """``-rP`` prints the rows of the table in docs/equivalence.md."""
    for found in ranks.run(on_ranks, BACKENDS[backend], model, MIXTURES, True, RANKS):
        measured = distances(found, model)
        for (layout, fused, sp_size), (loss, gradient) in zip(MIXTURES, measured, strict=True):
            words = f"{layout}, {'fused' if fused else 'plain'}, sp_size {sp_size}"
            sys.stdout.write(f"| {backend}, {model}: {words} | {loss:.1e} | {gradient:.1e} |\n")
            assert loss < ROUNDING and gradient < ROUNDING, words


@pytest.mark.full
@pytest.mark.parametrize("model", ["dense", "dense, LoRA"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_of_ranks_that_share_sequences_average_their_gradients(rank_pools: Any, backend: str, model: str) -> None:
    """Four ranks, two to a sequence: what is shared within a pair is summed over pairs, and not the other way about."""
    mixtures = [("padded", False, 2), ("packed", True, 2)]
    for found in rank_pools(4).run(on_ranks, BACKENDS[backend], model, mixtures, True, 4):
        assert all(loss < ROUNDING and gradient < ROUNDING for loss, gradient in distances(found, model))


# ---- rollouts of ranks that share their sequences ------------------------------------------------------------------
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4], [3, 3, 3, 9]]
SAMPLING = {"temperature": 1.0, "max_tokens": 6, "n": 2}


def generate(folder: str, sp_size: int, prompts: list[list[int]]) -> tuple[list[Any], list[int]]:
    """This rank's outputs, and how many responses its own engine wrote."""
    strategy = get_strategy(settings(RANKS, sp_size, fsdp=True, pretrain=folder, enable_engine_sleep=False))
    engine = strategy.setup_inference_engine(None, engine_type="hf")
    written, generate_all = [], engine.generate
    engine.generate = lambda requests, **options: written.append(len(requests)) or generate_all(requests, **options)
    mine = prompts[strategy.data_parallel_rank :: strategy.data_parallel_size]
    outputs = strategy.gather_and_generate(
        SAMPLING, all_prompt_token_ids=mine, step=3, prompt_indices=[prompts.index(prompt) for prompt in mine]
    )
    return [(tuple(o.prompt_token_ids), tuple(o.output_token_ids)) for o in outputs], written


def disagree(folder: str) -> str:
    strategy = get_strategy(settings(RANKS, 2, fsdp=True, pretrain=folder))
    strategy.setup_inference_engine(None, engine_type="hf")
    with pytest.raises(ValueError) as error:
        strategy.gather_and_generate(SAMPLING, all_prompt_token_ids=[[5 + strategy.rank]])
    return str(error.value)


def test_ranks_that_share_sequences_share_the_rollout_and_all_get_all_of_it(ranks: Any, tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path)
    (first, _), (second, _) = ranks.run(generate, folder, 1, PROMPTS)
    expected = [
        item for pair in zip(first[0::2], first[1::2], second[0::2], second[1::2], strict=True) for item in pair
    ]
    shared = ranks.run(generate, folder, 2, PROMPTS)
    assert [outputs for outputs, _ in shared] == [expected, expected]
    assert [written for _, written in shared] == [[4], [4]]


def test_ranks_that_share_sequences_must_bring_the_same_prompts(ranks: Any, tmp_path: Path) -> None:
    for text in ranks.run(disagree, save_tiny_model("qwen2", tmp_path)):
        assert "ranks 0, 1 share their sequences (--sp_size 2) but got different prompts" in text


# ---- what concerns data counts once a sequence group ---------------------------------------------------------------
def counted() -> tuple[Any, ...]:
    strategy = get_strategy(settings(4, 2, fsdp=True))
    strategy.setup_distributed()
    rank, data_rank = strategy.rank, strategy.data_parallel_rank
    calls: list[int] = []
    once = strategy.once_a_sequence(lambda: calls.append(rank) or f"graded on {rank}")
    return (
        strategy.reduce_over_data(data_rank + 1, "sum"),
        strategy.gather_over_data((data_rank, "some")),
        strategy.gather_over_data(torch.tensor([data_rank])).tolist(),
        once,
        len(calls),
    )


def grading_fails() -> str:
    strategy = get_strategy(settings(2, 2, fsdp=True))
    with pytest.raises(Exception) as error:
        strategy.once_a_sequence(lambda: {}["grade"])
    return str(error.value)


def test_ranks_that_share_sequences_count_once_and_grade_once(rank_pools: Any) -> None:
    for rank, (total, gathered, tensors, once, calls) in enumerate(rank_pools(4).run(counted)):
        assert (total, gathered, tensors) == (3, [(0, "some"), (1, "some")], [0, 1])
        assert once == f"graded on {rank - rank % 2}" and calls == (rank % 2 == 0)


def norm_of_a_step(backend: dict[str, Any]) -> float | None:
    """Of the gradient of a sum over all data, of which ranks that share a sequence hold the same."""
    strategy = get_strategy(settings(4, 2, **backend))
    model = strategy.prepare(torch.nn.Linear(2, 1, bias=False))
    optimizer = strategy.create_optimizer(model)
    loss = model(torch.full((1, 2), strategy.data_parallel_rank + 1.0)).sum()
    strategy.backward(loss, model, optimizer, scale=1.0)
    return strategy.optimizer_step(optimizer, model, None).grad_norm


@pytest.mark.parametrize("backend", ["FSDP2", "ZeRO 3"])
def test_gradients_are_summed_over_data_and_not_over_the_ranks_of_a_sequence(rank_pools: Any, backend: str) -> None:
    assert rank_pools(4).run(norm_of_a_step, BACKENDS[backend]) == [pytest.approx(math.hypot(1 + 2, 1 + 2))] * 4


def test_a_failure_on_the_rank_that_grades_fails_on_all(ranks: Any) -> None:
    assert ranks.run(grading_fails) == ["'grade'", "rank 0: KeyError: 'grade'"]
