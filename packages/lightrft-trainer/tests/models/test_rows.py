from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.models import pad_rows
from lightrft.models.rows import check_right_padded, trimmed_length

PROMPT = st.lists(st.integers(1, 99), min_size=1, max_size=6)
RESPONSE = st.lists(st.integers(1, 99), max_size=6)


@given(st.lists(st.tuples(PROMPT, RESPONSE), min_size=1, max_size=5))
def test_rows_come_apart_again_by_their_masks(pairs: list[tuple[list[int], list[int]]]):
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    rows = pad_rows(prompts, responses, pad_token_id=0)
    longest = max(len(p) + len(r) for p, r in pairs)
    assert rows.sequences.shape == rows.attention_mask.shape == rows.response_mask.shape == (len(pairs), longest)
    for row, (prompt, response) in enumerate(pairs):
        assert rows.sequences[row][rows.attention_mask[row].bool()].tolist() == prompt + response
        assert rows.sequences[row][rows.response_mask[row]].tolist() == response
    assert (rows.sequences[~rows.attention_mask.bool()] == 0).all()
    check_right_padded(rows.attention_mask)
    assert trimmed_length(torch.nn.functional.pad(rows.attention_mask, (0, 3))) == longest


def test_padding_on_the_left_is_refused():
    with pytest.raises(ValueError, match=r"padded on the right.*pad_rows"):
        check_right_padded(torch.tensor([[1, 1, 0], [0, 1, 1]]))


def test_empty_prompts_and_unequal_counts_are_refused():
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        pad_rows([[1], []], [[1], [1]], pad_token_id=0)
    with pytest.raises(ValueError, match=r"2 prompts and 1 responses"):
        pad_rows([[1], [2]], [[1]], pad_token_id=0)


def test_no_rows_make_empty_tensors():
    assert pad_rows([], [], pad_token_id=0).sequences.shape == (0, 0)
