"""The built-in task: reverse four digits, with a tokenizer and a model small enough to learn it on a laptop.

``lightrft train`` without arguments trains on this task. It needs no network, every answer can be checked exactly,
and a model of two layers really generalises on it: no held-out string is in the training set.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
SEPARATOR = "="
DIGITS = "0123456789"
VOCABULARY = (PAD_TOKEN, EOS_TOKEN, SEPARATOR, *DIGITS)


@dataclasses.dataclass(frozen=True, slots=True)
class TaskExample:
    """One question whose answer can be checked: the prompt ``"4821="`` has the label ``"1284"``."""

    prompt: str
    label: str


@dataclasses.dataclass(frozen=True, slots=True)
class TaskSplit:
    """Training and held-out questions that have no string in common."""

    train: tuple[TaskExample, ...]
    held_out: tuple[TaskExample, ...]


def reverse_digits(*, length: int = 4, held_out: int = 512, seed: int = 42) -> TaskSplit:
    """All strings of ``length`` digits in a seeded order, the first ``held_out`` of them kept out of training.

    :param length: digits in a string, 2 to 6 (there are ``10 ** length`` strings, all of which are made).
    :param held_out: how many strings to keep for measuring; at least 1, and some must be left for training.
    :param seed: alone decides the order and the split.
    :raises ValueError: for a length or a held-out count outside those bounds.
    """
    if not 2 <= length <= 6:
        raise ValueError(f"reverse_digits makes strings of 2 to 6 digits, not of {length}")
    total = 10**length
    if not 1 <= held_out < total:
        raise ValueError(f"held_out={held_out} of {total} strings: choose between 1 and {total - 1}")
    order = list(range(total))
    random.Random(f"reverse_digits/{length}/{seed}").shuffle(order)
    strings = [f"{number:0{length}d}" for number in order]
    examples = tuple(TaskExample(prompt=string + SEPARATOR, label=string[::-1]) for string in strings)
    return TaskSplit(train=examples[held_out:], held_out=examples[:held_out])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each digit, ``=``, padding and end: 13 in all, made in memory.

    It has no chat template: the prompts are given to the model as they are. A character outside its vocabulary raises.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model_config(*, layers: int = 2, width: int = 128) -> LlamaConfig:
    """The configuration of a tiny Llama for this task; heads of 32, so that vLLM's CPU attention takes it too.

    Llama and not Qwen2, whose folders transformers always opens with Qwen2's tokenizer class. The initial weights are
    larger than usual: with 0.02 the noise of one policy gradient destroys what the model knows.
    """
    from transformers import LlamaConfig

    head_dim = 32
    if width % (2 * head_dim):
        raise ValueError(
            f"width={width} must be a multiple of {2 * head_dim}: heads are {head_dim} wide and come in pairs"
        )
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // (2 * head_dim),
        head_dim=head_dim,
        initializer_range=0.05,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS_TOKEN),
        pad_token_id=VOCABULARY.index(PAD_TOKEN),
    )


def build_model(*, seed: int = 42, layers: int = 2, width: int = 128) -> PreTrainedModel:
    """The tiny model with random fp32 weights from ``seed`` alone; the caller's random state is not changed."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(build_model_config(layers=layers, width=width)).float()
    # Generation stops at these ids wherever the folder is loaded, in any engine.
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    return model


def build_default_model(out_dir: str | pathlib.Path, seed: int = 42) -> pathlib.Path:
    """Write the untrained tiny model and its tokenizer as a Hugging Face folder, and return that folder.

    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it. See
    :func:`lightrft.data.warm_start.build_warm_model` for one that has already been trained on the task.
    """
    folder = pathlib.Path(out_dir)
    build_model(seed=seed).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
