from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightrft.models import Actor, ActorLanguage, ActorVL, TokenRows, pad_rows
from lightrft.testing.tiny_models import TEXT_KINDS, tiny_config, tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2]]
ROWS = pad_rows(PROMPTS, RESPONSES, pad_token_id=0)


def one_by_one(model: Any, prompts: Any, responses: Any, temperature: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Logprobs and entropies of each response, from a forward of that row alone, in float64."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
        normalized = (logits / temperature).log_softmax(-1)
        chosen = normalized.gather(-1, torch.tensor(response)[:, None])[:, 0]
        found.append((chosen, -(normalized.exp() * normalized).sum(-1)))
    return found


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_each_row_has_the_logprobs_that_it_has_alone(kind: str):
    actor = Actor(tiny_model(kind))
    with torch.no_grad():
        logprobs, entropies = actor(
            ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, temperature=0.7, return_entropy=True
        )
        expected = one_by_one(actor.model, PROMPTS, RESPONSES, 0.7)
    assert logprobs.shape == entropies.shape == ROWS.sequences.shape
    assert logprobs.dtype == torch.float32
    for row, (expected_logprobs, expected_entropies) in enumerate(expected):
        mask = ROWS.response_mask[row]
        assert torch.allclose(logprobs[row][mask].double(), expected_logprobs, atol=5e-6)
        assert torch.allclose(entropies[row][mask].double(), expected_entropies, atol=5e-6)
    assert (logprobs[~ROWS.response_mask] == 0).all()
    assert (entropies[~ROWS.response_mask] == 0).all()


def test_without_a_response_mask_every_token_but_the_first_has_its_logprob():
    actor = Actor(tiny_model("qwen2"))
    with torch.no_grad():
        everything = actor(ROWS.sequences, ROWS.attention_mask)
        responses = actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
        full = ROWS.attention_mask.bool().all(dim=1)  # the longest row, which needs no mask at all
        assert torch.allclose(actor(ROWS.sequences[full]), everything[full], atol=1e-6)
    assert torch.allclose(everything[ROWS.response_mask], responses[ROWS.response_mask], atol=1e-6)
    assert (everything[:, 0] == 0).all()
    assert (everything[:, 1:][ROWS.attention_mask[:, 1:].bool()] < 0).all()
    assert (everything[~ROWS.attention_mask.bool()] == 0).all()


def test_gradients_equal_those_of_the_whole_logits():
    model = tiny_model("qwen2_tied")
    weights = torch.randn(ROWS.sequences.shape, generator=torch.Generator().manual_seed(0))
    actor = Actor(copy.deepcopy(model))
    (actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask) * weights).sum().backward()
    logits = model(input_ids=ROWS.sequences, attention_mask=ROWS.attention_mask).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, ROWS.sequences[:, 1:, None])[..., 0]
    (chosen * (weights * ROWS.response_mask)[:, 1:]).sum().backward()
    for (name, ours), theirs in zip(actor.model.named_parameters(), model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4), name


def test_logits_are_made_for_response_tokens_alone():
    actor = Actor(tiny_model("qwen2"))
    shapes: list[tuple[int, ...]] = []
    head = actor.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    assert shapes == [(1, sum(map(len, RESPONSES)), 512)]


def test_the_model_is_itself_again_after_a_forward():
    actor = Actor(tiny_model("qwen2"))
    before = actor.model(input_ids=ROWS.sequences).logits
    actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    with pytest.raises(ValueError):
        actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, temperature=0.0)
    assert torch.equal(actor.model(input_ids=ROWS.sequences).logits, before)


def test_columns_that_are_padding_everywhere_are_not_computed():
    actor = Actor(tiny_model("qwen2"))
    actor.shares_prompts = False  # in that layout there is no padding at all
    wider = TokenRows(
        *(torch.nn.functional.pad(t, (0, 4)) for t in (ROWS.sequences, ROWS.attention_mask, ROWS.response_mask))
    )
    seen: list[int] = []
    embed = actor.model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    logprobs = actor(wider.sequences, wider.attention_mask, wider.response_mask)
    assert seen == [ROWS.sequences.shape[1]]
    assert logprobs.shape == wider.sequences.shape
    expected = actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    assert torch.equal(logprobs[:, : expected.shape[1]], expected)
    assert (logprobs[:, expected.shape[1] :] == 0).all()


def test_a_batch_without_response_tokens_still_reaches_every_parameter():
    # A rank with fewer micro-batches fills up with such: its backward pass must run the same collectives.
    actor = Actor(tiny_model("qwen2"))
    actor(ROWS.sequences, ROWS.attention_mask, torch.zeros_like(ROWS.response_mask)).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in actor.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = Actor(tiny_model("qwen2")), Actor(tiny_model("qwen2"), gradient_checkpointing=True)
    saving.train(), plain.train()
    assert saving.model.is_gradient_checkpointing
    for actor in (plain, saving):
        actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask).sum().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    saving.gradient_checkpointing_disable()
    assert not saving.model.is_gradient_checkpointing


def test_a_copy_computes_with_its_own_weights():
    actor = Actor(tiny_model("qwen2"))
    average = copy.deepcopy(actor)
    with torch.no_grad():
        before = average(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
        for parameter in actor.parameters():
            parameter.zero_()
        assert torch.equal(average(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask), before)


def test_an_actor_comes_from_a_folder_a_configuration_or_a_module(tmp_path: Path):
    model = tiny_model("qwen2", seed=4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = Actor(model)(ROWS.sequences, ROWS.attention_mask)
        assert torch.equal(Actor(str(tmp_path))(ROWS.sequences, ROWS.attention_mask), expected)
    loaded = Actor(tmp_path, dtype=torch.bfloat16)
    assert loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        empty = Actor(tiny_config("qwen2"))
    assert all(p.is_meta for p in empty.parameters())
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in loaded.named_parameters()]


def test_what_cannot_be_an_actor_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--pretrain is empty"):
        Actor("")
    with pytest.raises(ValueError, match=r"--flash_attn.*(not installed|bf16 or fp16)"):
        Actor(tiny_config("qwen2"), use_flash_attention_2=True)
    with pytest.raises(ValueError, match=r"takes no images"):
        ActorVL(tiny_config("qwen2"))
    assert isinstance(ActorLanguage(tiny_config("qwen2")), Actor)


def test_wrong_rows_are_refused():
    actor = Actor(tiny_model("qwen2"))
    with pytest.raises(ValueError, match=r"padded on the right"):
        actor(ROWS.sequences, ROWS.attention_mask.flip(1))
    with pytest.raises(ValueError, match=r"response_mask \(3, 4\) must have the shape of sequences, \(3, 10\)"):
        actor(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask[:, :4])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_images_reach_the_model_and_rows_stay_apart(kind: str):
    actor = ActorVL(tiny_model(kind))
    config = actor.config
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])  # patches; 2 × 2 of them make a token
    patch = config.vision_config.patch_size
    depth = 3 * config.vision_config.temporal_patch_size * patch * patch
    pixels = torch.randn(16 + 32, depth, generator=torch.Generator().manual_seed(1))
    image, start, end = config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
    prompts = [[start, *[image] * 4, end, 20, 21], [30, start, *[image] * 8, end, 31]]
    responses = [[40, 41, 42], [50]]
    rows = pad_rows(prompts, responses, pad_token_id=0)

    def logprobs(pixel_values: Tensor | None) -> Tensor:
        with torch.no_grad():
            return actor(
                rows.sequences, rows.attention_mask, rows.response_mask, pixel_values=pixel_values, image_grid_thw=grid
            )

    together = logprobs(pixels)
    assert (together[~rows.response_mask] == 0).all()
    alone = pad_rows(prompts[1:], responses[1:], pad_token_id=0)
    with torch.no_grad():
        second = actor(
            alone.sequences,
            alone.attention_mask,
            alone.response_mask,
            pixel_values=pixels[16:],
            image_grid_thw=grid[1:],
        )
    assert torch.allclose(second[alone.response_mask], together[1][rows.response_mask[1]], atol=1e-5)
    changed = logprobs(torch.cat([pixels[:16] + 1.0, pixels[16:]]))
    assert not torch.allclose(changed[0], together[0], atol=1e-4)
    assert torch.allclose(changed[1], together[1], atol=1e-5)


def test_a_vision_model_takes_text_alone():
    actor = ActorVL(tiny_model("qwen2_vl"))
    with torch.no_grad():
        logprobs = actor(
            ROWS.sequences, ROWS.attention_mask, ROWS.response_mask, pixel_values=None, image_grid_thw=None
        )
        for row, (expected, _) in enumerate(one_by_one(actor.model, PROMPTS, RESPONSES)):
            assert torch.allclose(logprobs[row][ROWS.response_mask[row]].double(), expected, atol=5e-6)
