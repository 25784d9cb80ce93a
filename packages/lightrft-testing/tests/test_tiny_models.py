from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft.testing.tiny_models import (
    CONFIGS,
    EOS,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VOCABULARY,
    save_tiny_model,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("kind", CONFIGS)
def test_head_dimensions_suit_every_engine(kind: str) -> None:
    text = tiny_config(kind).get_text_config()
    assert (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) == 32
    assert text.vocab_size == VOCABULARY


def test_the_same_seed_gives_the_same_weights_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    first, second, other = tiny_model("qwen2"), tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name)), name


def test_what_happens_to_one_model_does_not_reach_the_next() -> None:
    first, made = tiny_model("qwen2"), tiny_model("qwen2", initializer_range=0.15)  # the second is no copy
    for parameter in first.parameters():
        parameter.data.zero_()
    first.config.hidden_size = first.generation_config.max_length = 7
    second = tiny_model("qwen2")
    assert all(torch.equal(value, second.get_parameter(name)) for name, value in made.named_parameters())
    assert second.config.to_dict() == made.config.to_dict()
    assert second.generation_config.to_dict() == made.generation_config.to_dict()


def test_tied_embeddings_are_one_tensor_and_untied_are_two() -> None:
    tied, untied = tiny_model("qwen2_tied"), tiny_model("qwen2")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no tiny model 'qwen9'; there are qwen2, qwen2_tied"):
        tiny_model("qwen9")


def test_a_saved_folder_loads_with_its_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "model")
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tiny_model("qwen2")
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in model.named_parameters())
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id == EOS


def test_the_tokenizer_writes_and_reads_any_text() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    for text in ("count the stones", "Übermut, 42 €\n\t漢字"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_has_a_place_for_images() -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the picture"}]}
    ids = tiny_tokenizer().apply_chat_template([message], add_generation_prompt=True)["input_ids"]
    assert list(ids).count(IMAGE_PAD) == 1
