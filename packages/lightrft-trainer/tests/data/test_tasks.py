from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lightrft.data.tasks import VOCABULARY, build_default_model, build_model, build_tokenizer, reverse_digits


@given(length=st.integers(2, 4), seed=st.integers(0, 10**6), share=st.floats(0.001, 0.999))
@settings(max_examples=20)
def test_training_and_held_out_strings_are_disjoint_and_complete(length: int, seed: int, share: float):
    held_out = min(10**length - 1, max(1, round(share * 10**length)))
    split = reverse_digits(length=length, held_out=held_out, seed=seed)
    train, test = {e.prompt for e in split.train}, {e.prompt for e in split.held_out}
    assert len(test) == held_out
    assert not train & test
    assert len(train | test) == 10**length
    assert all(e.label == e.prompt[:-1][::-1] for e in (*split.train, *split.held_out))


def test_the_seed_alone_decides_the_split():
    assert reverse_digits(seed=1) == reverse_digits(seed=1)
    assert reverse_digits(seed=1).held_out != reverse_digits(seed=2).held_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "2 to 6"),
        ({"length": 7}, "2 to 6"),
        ({"held_out": 0}, "between 1 and 9999"),
        ({"held_out": 10_000}, "between 1 and 9999"),
    ],
)
def test_impossible_splits_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        reverse_digits(**options)


def test_the_tokenizer_has_one_token_a_character_and_reads_back():
    tokenizer = build_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == len(VOCABULARY) == 13
    ids = tokenizer("4821=")["input_ids"]
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "4821="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == "4821="
    assert tokenizer.chat_template is None


def test_a_character_outside_the_vocabulary_raises():
    with pytest.raises(Exception, match=r"vocabulary"):
        build_tokenizer()("4a")


def test_the_folder_loads_with_the_auto_classes_and_the_same_tokens(tmp_path: Path):
    folder = build_default_model(tmp_path / "model", seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    # Some model types make AutoTokenizer replace our class by theirs, which drops what it does not know.
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer("0123456789=")["input_ids"] == build_tokenizer()("0123456789=")["input_ids"]
    with pytest.raises(Exception, match=r"vocabulary"):
        tokenizer("4a")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (model.config.pad_token_id, model.config.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    for name, weight in build_model(seed=3).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_building_a_model_leaves_the_caller_s_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(seed=1)
    assert torch.equal(torch.rand(3), expected)
