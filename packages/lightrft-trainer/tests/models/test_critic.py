from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightrft.models import Critic, RewardModel, get_llm_for_sequence_regression, pad_rows
from lightrft.models.critic import ValueHead
from lightrft.strategy import FakeStrategy
from lightrft.testing.tiny_models import tiny_config, tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4]]
RESPONSES = [[20, 21, 2], [30, 31, 32, 33, 2], [40, 2]]
ROWS = pad_rows(PROMPTS, RESPONSES, pad_token_id=0)


@pytest.fixture
def critic() -> Critic:
    torch.manual_seed(0)
    critic = Critic(tiny_config("qwen2")).eval()
    torch.nn.init.normal_(critic.value_head.weight)
    return critic


def test_a_value_is_that_of_the_state_before_the_token(critic: Critic):
    with torch.no_grad():
        values = critic(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            hidden = critic.model(input_ids=torch.tensor([prompt + response])).last_hidden_state
            states = critic.value_head(hidden)[0, len(prompt) - 1 : -1, 0]
            assert torch.allclose(values[row][ROWS.response_mask[row]], states, atol=1e-5)
    assert values.shape == ROWS.sequences.shape
    assert (values[~ROWS.response_mask] == 0).all()


def test_later_tokens_do_not_change_a_value(critic: Critic):
    changed = ROWS.sequences.clone()
    changed[1, 7] = 99
    with torch.no_grad():
        before = critic(ROWS.sequences, ROWS.attention_mask)
        after = critic(changed, ROWS.attention_mask)
    assert torch.allclose(after[1, :8], before[1, :8], atol=1e-6)
    assert not torch.allclose(after[1, 8:], before[1, 8:], atol=1e-3)


def test_a_new_critic_expects_nothing():
    critic = Critic(tiny_config("qwen2"))
    assert (critic(ROWS.sequences, ROWS.attention_mask) == 0).all()
    assert critic.is_critic


def test_not_a_number_at_padding_does_not_reach_the_loss(critic: Critic):
    critic.shares_prompts = False  # in that layout there is no padding at all
    critic.value_head.register_forward_hook(
        lambda module, args, output: output.masked_fill(ROWS.attention_mask[..., None] == 0, float("nan"))
    )
    values = critic(ROWS.sequences, ROWS.attention_mask, ROWS.response_mask)
    values.sum().backward()
    assert torch.isfinite(values).all()


def test_the_factory_knows_both_kinds():
    assert isinstance(get_llm_for_sequence_regression(tiny_config("qwen2"), "critic"), Critic)
    assert isinstance(get_llm_for_sequence_regression(tiny_config("qwen2"), "reward"), RewardModel)
    with pytest.raises(ValueError, match=r"'critic' and 'reward'"):
        get_llm_for_sequence_regression(tiny_config("qwen2"), "judge")  # type: ignore[arg-type]


def test_a_saved_critic_says_the_same(critic: Critic, tmp_path: Path):
    FakeStrategy().save_model(critic, None, tmp_path)
    read = get_llm_for_sequence_regression(tmp_path, "critic").eval()
    with torch.no_grad():
        assert torch.equal(read(ROWS.sequences, ROWS.attention_mask), critic(ROWS.sequences, ROWS.attention_mask))


def test_a_language_model_makes_a_critic_that_expects_nothing(tmp_path: Path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    assert (Critic(tmp_path)(ROWS.sequences, ROWS.attention_mask) == 0).all()


def test_a_head_of_another_width_is_refused(critic: Critic, tmp_path: Path):
    FakeStrategy().save_model(critic, None, tmp_path)
    with pytest.raises(ValueError, match=r"value_head.weight is \(1, \d+\), but this model needs \(1, 8\)"):
        ValueHead(8, dtype=torch.float32, source=str(tmp_path))
