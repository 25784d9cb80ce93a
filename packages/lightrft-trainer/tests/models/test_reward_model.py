from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, GraniteConfig

from lightrft.models import ActorLanguage, RewardModel, pad_rows
from lightrft.testing.tiny_models import tiny_config, tiny_model

END = 2
ROWS = pad_rows([[5, 6, 7], [8]], [[20, 21, END], [30, END]], pad_token_id=END)


def make() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(tiny_config("qwen2", pad_token_id=END)).eval()


def test_a_row_has_the_score_that_it_has_alone():
    model = make()
    with torch.no_grad():
        scores = model(ROWS.sequences, ROWS.attention_mask)
        alone = model(torch.tensor([[8, 30, END]]))
    assert scores.shape == (2,)
    assert torch.allclose(scores[1:], alone, atol=1e-6)


def test_the_end_token_counts_even_where_padding_is_the_same_token():
    model = make()
    with torch.no_grad():
        hidden = model.model.base_model(input_ids=torch.tensor([[8, 30, END]])).last_hidden_state
        expected = model.model.score(hidden[:, 2])[:, 0]
        assert torch.allclose(model(ROWS.sequences, ROWS.attention_mask)[1:], expected, atol=1e-6)


def test_a_saved_classifier_scores_the_same(tmp_path: Path):
    model = make()
    model.model.save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 1
    with torch.no_grad():
        loaded = RewardModel(tmp_path).eval()
        assert torch.equal(loaded(ROWS.sequences, ROWS.attention_mask), model(ROWS.sequences, ROWS.attention_mask))


def test_rows_without_tokens_and_left_padding_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"no token"):
        model(ROWS.sequences, torch.zeros_like(ROWS.attention_mask))
    with pytest.raises(ValueError, match=r"padded on the right"):
        model(ROWS.sequences, ROWS.attention_mask.flip(1))


def test_a_model_without_a_padding_token_takes_batches():
    torch.manual_seed(0)
    model = RewardModel(tiny_config("qwen2", pad_token_id=None)).eval()
    with torch.no_grad():
        assert torch.allclose(
            model(ROWS.sequences, ROWS.attention_mask)[1:], model(torch.tensor([[8, 30, END]])), atol=1e-6
        )


def test_an_encoder_classifier_is_refused_by_name():
    small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no `score` layer"):
        RewardModel(small)


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path):
    """A language model would score at random, a classifier write so."""
    tiny_model("qwen2").save_pretrained(tmp_path / "generator")
    RewardModel(tiny_config("qwen2")).model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"generator: has no score\.weight, which Qwen2ForSequenceC"):
        RewardModel(tmp_path / "generator")
    with pytest.raises(ValueError, match=r"classifier: has no lm_head\.weight, which Qwen2ForCausalLM would"):
        ActorLanguage(tmp_path / "classifier")


def test_a_family_without_a_classifier_is_refused_by_name():
    said = (
        "GraniteConfig: transformers has no AutoModelForSequenceClassification for models of type granite; use a reward"
    )
    with pytest.raises(ValueError, match=said):
        RewardModel(GraniteConfig())
