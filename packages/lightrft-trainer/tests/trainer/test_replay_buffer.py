from __future__ import annotations

from typing import Any

import pytest
import torch

from lightrft.trainer.experience import TOKEN_FIELDS, Experience, make_batch, pack, split_rows, unpack
from lightrft.trainer.replay_buffer import OptimizerBatch, ReplayBuffer, SampleRecord

CPU = torch.device("cpu")


def sample(index: int, prompt: int = 3, response: int = 2, **fields: object) -> Experience:
    generator = torch.Generator().manual_seed(index)
    return Experience(
        index=index,
        prompt_index=100 + index,
        tokens=torch.randint(1, 50, (prompt + response,), generator=generator),
        response_length=response,
        reward=0.1 * index,
        shaped_reward=0.3 * index,
        finished=index % 2 == 0,
        weight_version=7,
        engine_logprobs=-torch.rand(response, generator=generator),
        advantages=torch.randn(response, generator=generator),
        **fields,
    )


def same(one: Experience, other: Experience) -> bool:
    numbers = ("index", "prompt_index", "response_length", "reward", "shaped_reward", "finished", "weight_version")
    tensors = all(
        (getattr(one, n) is None and getattr(other, n) is None) or torch.equal(getattr(one, n), getattr(other, n))
        for n in ("tokens", *TOKEN_FIELDS)
    )
    images = one.images.keys() == other.images.keys() and all(
        torch.equal(one.images[k], other.images[k]) for k in one.images
    )
    return tensors and images and all(getattr(one, n) == getattr(other, n) for n in numbers)


def test_batches_are_right_padded_with_the_mask_on_the_response() -> None:
    batch = make_batch([sample(0), sample(1, prompt=1, response=1)], pad_token_id=0, device=CPU)
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert batch.tokens[1, 2:].tolist() == [0, 0, 0]


def test_per_token_figures_land_on_their_tokens() -> None:
    samples = [sample(0), sample(1, prompt=1, response=1)]
    batch = make_batch(samples, 0, CPU)
    assert torch.equal(batch.advantages[0, 3:], samples[0].advantages)
    assert torch.equal(batch.advantages[1, 1:2], samples[1].advantages)
    assert (batch.advantages[~batch.mask] == 0).all()
    assert [row.tolist() for row in split_rows(batch.advantages, batch.mask)] == [
        s.advantages.tolist() for s in samples
    ]


def test_a_figure_that_no_sample_has_is_absent() -> None:
    with pytest.raises(AttributeError, match="no old_logprobs; it has advantages, engine_logprobs"):
        _ = make_batch([sample(0)], 0, CPU).old_logprobs


def test_no_samples_make_a_dummy_row_without_loss() -> None:
    batch = make_batch([], 0, CPU)
    assert batch.tokens.shape[0] == 1
    assert not batch.mask.any()


def test_samples_come_back_from_tensors_to_the_bit() -> None:
    samples = [
        sample(4, old_logprobs=torch.randn(2)),
        sample(9, response=0),
        sample(2, images={"pixel_values": torch.randn(3, 4), "image_grid_thw": torch.tensor([[1, 2, 2]])}),
    ]
    assert all(same(a, b) for a, b in zip(samples, unpack(pack(samples)), strict=True))
    assert unpack(pack([])) == []


def filled(ranks: int, prompts: int = 4, n: int = 2) -> list[ReplayBuffer]:
    samples = [sample(index, prompt=1 + index % 3) for index in range(prompts * n)]
    records = {s.index: SampleRecord.of(s, s.index // n % ranks) for s in samples}
    buffers = [ReplayBuffer() for _ in range(ranks)]
    for rank, buffer in enumerate(buffers):
        buffer.fill([s for s in samples if records[s.index].owner == rank], records)
    return buffers


def plan(buffer: ReplayBuffer, rank: int = 0, ranks: int = 1) -> list[OptimizerBatch]:
    steps = buffer.steps(n_samples=2, batch_size=4, seed=0, step=0, epoch=0)
    return buffer.plan(steps, micro_batch_size=1, rank=rank, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_optimizer_steps_hold_the_same_samples_at_any_world_size(ranks: int) -> None:
    alone = plan(filled(1)[0])
    plans = [plan(buffer, rank, ranks) for rank, buffer in enumerate(filled(ranks))]
    for step, whole in enumerate(alone):
        parts = [index for mine in plans for micro in mine[step].microbatches for index in micro.indices]
        assert sorted(parts) == list(whole.indices)
        assert all(mine[step].tokens == whole.tokens for mine in plans)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (2, 4), (4, 2)])
def test_a_buffer_is_restored_on_any_number_of_ranks(before: int, after: int) -> None:
    states = [buffer.state_tensors() for buffer in filled(before)]
    restored = [ReplayBuffer.restore(states, n_samples=2, rank=rank, ranks=after) for rank in range(after)]
    expected = filled(after)
    for mine, theirs in zip(restored, expected, strict=True):
        assert mine.records == theirs.records
        assert all(same(a, b) for a, b in zip(mine.items, theirs.items, strict=True))


def test_holes_that_dynamic_sampling_leaves_are_skipped() -> None:
    buffer = ReplayBuffer()
    samples = [sample(index, response=index % 3) for index in (0, 1, 6, 7)]
    buffer.fill(samples, {s.index: SampleRecord(0, s.length, s.response_length) for s in samples})
    steps = plan(buffer)
    assert sorted(index for step in steps for index in step.indices) == [0, 1, 6, 7]
    assert [(step.tokens, step.sequences) for step in steps] == [(2, 2)], "two have a response, of one token each"


def test_an_empty_buffer_has_no_optimizer_steps() -> None:
    assert plan(ReplayBuffer()) == []


def test_samples_go_to_their_new_owners_whole() -> None:
    buffers = filled(2)
    everything = {s.index: s for buffer in buffers for s in buffer.items}
    leaving: list[list[Any]] = []
    owners = {index: (index + 1) % 2 for index in everything}
    for rank, buffer in enumerate(buffers):  # what the ranks have to give, before any of them takes
        copy = ReplayBuffer(dict(buffer.samples), dict(buffer.records))
        copy.exchange(owners, rank=rank, gather=lambda mine: leaving.append(mine) or [])
    for rank, buffer in enumerate(buffers):
        buffer.exchange(owners, rank=rank, gather=lambda mine: leaving)
        assert list(buffer.samples) == [index for index in sorted(everything) if owners[index] == rank]
        assert all(same(s, everything[index]) for index, s in buffer.samples.items())
        assert {index: record.owner for index, record in buffer.records.items()} == owners
