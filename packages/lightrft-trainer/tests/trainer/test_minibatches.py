from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.trainer.minibatches import cut_microbatches, plan_minibatches


def plan(prompts: int, n: int, batch: int, epoch: int = 0, step: int = 3) -> list[list[int]]:
    return plan_minibatches(prompts=prompts, n_samples=n, batch_size=batch, seed=1, step=step, epoch=epoch)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_every_sample_is_trained_on_once_an_epoch(prompts: int, n: int, batch: int) -> None:
    steps = plan(prompts, n, batch)
    assert sorted(index for step in steps for index in step) == list(range(prompts * n))
    assert all(len(step) <= batch for step in steps)
    assert len(steps) == -(-prompts * n // min(batch, prompts * n))


def test_epochs_and_steps_are_shuffled_differently_and_repeatably() -> None:
    assert plan(8, 4, 8) == plan(8, 4, 8)
    assert plan(8, 4, 8) != plan(8, 4, 8, epoch=1)
    assert plan(8, 4, 8) != plan(8, 4, 8, step=4)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 16, 24]), st.integers(1, 4), st.sampled_from([8, 16, 32]))
@settings(max_examples=60, deadline=None)
def test_ranks_have_equal_shares_of_every_optimizer_step(ranks: int, prompts: int, n: int, batch: int) -> None:
    owners = {index: index // n % ranks for index in range(prompts * n)}
    for step in plan(prompts, n, batch):
        shares = [sum(owners[index] == rank for index in step) for rank in range(ranks)]
        assert max(shares) - min(shares) <= (0 if len(step) % ranks == 0 else 1)


def test_ranks_with_less_fill_up_with_empty_micro_batches() -> None:
    owners = {0: 0, 1: 0, 2: 0, 3: 1}
    cut = cut_microbatches([0, 1, 2, 3], owners, dict.fromkeys(range(4), 5), world_size=3, size=2)
    assert [len(batches) for batches in cut] == [2, 2, 2]
    assert [b.indices for b in cut[0]] == [(0, 1), (2,)]
    assert [b.indices for b in cut[1]] == [(3,), ()]
    assert [b.indices for b in cut[2]] == [(), ()]


def test_micro_batches_hold_similar_lengths() -> None:
    lengths = {0: 9, 1: 1, 2: 8, 3: 2}
    (cut,) = cut_microbatches([0, 1, 2, 3], dict.fromkeys(range(4), 0), lengths, world_size=1, size=2)
    assert [b.indices for b in cut] == [(1, 3), (2, 0)]
