"""Samples of one prompt: the numbers of each alone, with the prompt computed once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightrft.models import Actor, Critic, pad_rows, shared_prompts, token_model
from lightrft.models.shared_prompts import SharedPrompts, alike
from lightrft.testing.tiny_models import TEXT_KINDS, tiny_config, tiny_model

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [8, 9, 10]
# Samples of three prompts in no order: one prompt of a single token, one sample without an answer.
PROMPTS = [LONG, SHORT, LONG, [4], LONG, SHORT, [4], LONG]
RAGGED = [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2], [7, 8, 9, 7, 8, 9, 7, 8, 2], [6, 2], [9, 8, 2], [9, 2], []]
EVEN = [[20 + i, 30, 31, 2] for i in range(8)]


def rows_of(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    rows = pad_rows(prompts, responses, pad_token_id=0)
    return rows.sequences, rows.attention_mask, rows.response_mask


BATCHES = {"ragged": rows_of(PROMPTS, RAGGED), "even": rows_of([LONG] * 4 + [LONG[::-1]] * 4, EVEN)}


def widths(model: Any) -> list[tuple[int, ...]]:
    """Shapes of the token ids that the model is going to see."""
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    return seen


def gradients(module: Any, batch: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model says of the rows, and the gradient of a weighted sum of it."""
    values = module(*batch, **options)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (values * weights).sum().backward()
    return values.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any, atol: float = 1e-6) -> None:
    """In float64, but for transformers' norms and rotations, which compute in float32."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=atol)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=10 * atol)


def plainly(module: Any) -> Any:
    module.shares_prompts = False
    return module


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", [*TEXT_KINDS, "qwen2_sliding", "mistral"])
def test_shared_prompts_have_the_logprobs_and_gradients_of_plain_rows(
    kind: str, batch: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_prompts, "FREE_PADDING", 4)  # so that there are several parts
    single = kind == "qwen3_moe"  # its experts' products do not exist in float64
    model = tiny_model(kind, dtype=torch.float32 if single else torch.float64)
    plain = gradients(plainly(Actor(copy.deepcopy(model)).train()), BATCHES[batch], temperature=0.7)
    for options in ({}, {"gradient_checkpointing": True}, {"packing_samples": True, "fused_linear_logprob": True}):
        actor = Actor(copy.deepcopy(model), **options).train()
        seen = widths(actor.model)
        shared = gradients(actor, BATCHES[batch], temperature=0.7)
        assert seen[0] == ((1, 9 + 2 + 27) if batch == "ragged" else (1, 2 * 9 + 8 * 4))
        assert_same(shared, plain, atol=2e-5 if single else 1e-6)


def test_shared_prompts_have_the_values_of_plain_rows():
    torch.manual_seed(0)
    critic = Critic(tiny_config("qwen2")).double()
    nn.init.normal_(critic.value_head.weight)
    plain = plainly(copy.deepcopy(critic))
    assert critic.shares_prompts
    assert_same(gradients(critic, BATCHES["ragged"]), gradients(plain, BATCHES["ragged"]))


def test_a_sample_moves_none_of_its_neighbours():
    actor = Actor(tiny_model("qwen2"))
    sequences, *masks = BATCHES["ragged"]
    other = sequences.clone()
    other[3, 1:10] = 77
    with torch.no_grad():
        before, after = actor(sequences, *masks), actor(other, *masks)
    neighbours = [row for row in range(len(PROMPTS)) if row != 3]
    assert torch.equal(before[neighbours], after[neighbours]) and not torch.equal(before[3], after[3])


def test_only_what_saves_enough_and_changes_nothing_is_shared():
    even, (sequences, mask, response) = BATCHES["even"], BATCHES["ragged"]
    sevenths = rows_of([LONG, LONG], [list(range(20, 60))] * 2)  # 100 - 10 of 100 tokens: not worth it
    dropping = tiny_model("qwen2", attention_dropout=0.1)
    eager = tiny_model("qwen2")
    eager.set_attn_implementation("eager")
    cases = [
        (Actor(tiny_model("qwen2")), (sequences, mask, None)),  # every token is asked about, the prompts' as well
        (Actor(tiny_model("qwen2")), sevenths),
        (Actor(tiny_model("qwen2")), tuple(part[:1] for part in even)),
        (Actor(dropping).train(), even),
        (Actor(eager), (sequences, mask, response)),
    ]
    for actor, batch in cases:
        seen = widths(actor.model)
        actor(*batch)
        assert seen == [tuple(batch[0].shape)]
    seen = widths(dropping)
    Actor(dropping).eval()(*even)
    assert seen[-1] == (1, 2 * 9 + 8 * 4)


def test_where_masks_would_be_large_rows_are_packed_or_left_as_they_are(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("qwen2")
    for name, (sequences, mask, response) in BATCHES.items():
        shared = gradients(Actor(copy.deepcopy(model)), (sequences, mask, response))
        with monkeypatch.context() as patch:
            patch.setattr(token_model, "LARGEST_MASK", 10)
            actor = Actor(copy.deepcopy(model))
            seen = widths(actor.model)
            assert_same(gradients(actor, (sequences, mask, response)), shared, atol=2e-5)
        assert seen == [(1, int(mask.sum())) if name == "ragged" else tuple(sequences.shape)]


def test_similar_lengths_are_padded_to_one_and_others_are_not():
    assert alike([7, 7, 7]) == [slice(0, 3)]
    assert alike([100, 101, 120, 2000, 2100]) == [slice(0, 3), slice(3, 5)]
    assert alike([5] * 3 + [600]) == [slice(0, 3), slice(3, 4)]


def test_tokens_come_back_to_their_places():
    sequences, _, response = BATCHES["ragged"]
    asked = nn.functional.pad(response[:, 1:], (0, 1))
    layout = SharedPrompts.of(sequences, asked, at_most=1e9)
    assert layout is not None and SharedPrompts.of(sequences, asked, at_most=37) is None
    back = layout.restore(layout.place(sequences))
    assert torch.equal(back[asked], sequences[asked])
