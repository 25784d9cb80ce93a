from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightrft.data import (
    DataError,
    PromptDataset,
    PromptFormat,
    Record,
    build_prompt_dataset,
    prompt_dataset_from_config,
)
from lightrft.data.tasks import build_tokenizer
from lightrft.strategy import StrategyConfig
from lightrft.testing.tiny_models import tiny_tokenizer

TASK = "task:reverse_digits"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def records(*lines: dict[str, Any]) -> list[Record]:
    return [Record(line, f"data.jsonl:{number}") for number, line in enumerate(lines, start=1)]


def test_items_are_rendered_tokenized_and_numbered(tokenizer: Any):
    data = PromptDataset(records({"input": "1 + 1", "label": "2"}, {"input": "2 + 2", "label": 4}), tokenizer)
    assert [(p.index, p.prompt, p.label, p.images, p.origin) for p in data] == [
        (0, "1 + 1", "2", None, "data.jsonl:1"),
        (1, "2 + 2", 4, None, "data.jsonl:2"),
    ]
    assert data[1].prompt_token_ids == tokenizer("2 + 2")["input_ids"]
    assert data.collate_fn([data[1], data[0]]) == [data[1], data[0]]


def test_the_chat_template_s_own_special_tokens_are_not_doubled():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    plain = PromptDataset(records({"input": "hi", "label": ""}), tokenizer)[0]
    assert plain.prompt_token_ids[0] == start
    chat = PromptDataset(
        records({"input": "hi", "label": ""}), tokenizer, prompt_format=PromptFormat(apply_chat_template=True)
    )[0]
    assert chat.prompt_token_ids[0] == start
    assert chat.prompt_token_ids[1] != start


def test_a_line_without_its_key_is_named_with_the_keys_it_has(tokenizer: Any, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"input": "1", "label": "1"}, {"question": "2", "label": "2"}, {"input": "3"}])
    with pytest.raises(DataError) as caught:
        build_prompt_dataset(path, tokenizer)
    text = str(caught.value)
    assert "2 faults" in text
    assert f"{path}:2: no 'input'; it has 'question', 'label' (--input_key)" in text
    assert f"{path}:3: no 'label'; it has 'input' (--label_key)" in text


def test_a_key_that_is_null_is_named(tokenizer: Any):
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'label' is null"):
        PromptDataset(records({"input": "1", "label": None}), tokenizer)


def test_labels_can_be_done_without(tokenizer: Any):
    assert PromptDataset(records({"input": "1"}), tokenizer, label_key=None)[0].label is None


def test_optional_labels_may_be_missing_from_all_lines_but_not_from_some(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
):
    data = PromptDataset(
        records({"input": "1"}, {"input": "2", "label": None, "answer": "2"}), tokenizer, labels_optional=True
    )
    assert [prompt.label for prompt in data] == [None, None]
    (told,) = caplog.messages
    assert told == (
        "--prompt_data: no line has a label under the key 'label', so rewards get None as labels; "
        "the lines have 'input', 'label', 'answer' (--label_key)"
    )
    with pytest.raises(DataError, match=r"data\.jsonl:2: no 'label'; it has 'input' \(--label_key\)"):
        PromptDataset(records({"input": "1", "label": "1"}, {"input": "2"}), tokenizer, labels_optional=True)


def test_an_empty_prompt_is_a_fault(tokenizer: Any):
    with pytest.raises(DataError, match=r"data.jsonl:1: the prompt is empty"):
        PromptDataset(records({"input": "", "label": "1"}), tokenizer)


LONG_AND_SHORT = [{"input": "1 " * 50, "label": ""}, {"input": "1", "label": ""}, {"input": "2 " * 60, "label": ""}]


def test_long_prompts_are_left_out_counted_and_named(tokenizer: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        data = PromptDataset(records(*LONG_AND_SHORT), tokenizer, prompt_max_len=20)
    assert [(p.index, p.origin) for p in data] == [(0, "data.jsonl:2")]
    assert "2 of 3 prompts are longer than --prompt_max_len 20: data.jsonl:1" in caplog.text
    assert len(data.dropped) == 2


def test_long_prompts_can_be_refused(tokenizer: Any):
    with pytest.raises(DataError, match=r"2 of 3 prompts are longer.*raise --prompt_max_len"):
        PromptDataset(records(*LONG_AND_SHORT), tokenizer, prompt_max_len=20, overlong="refuse")


def test_a_dataset_of_long_prompts_only_is_an_error(tokenizer: Any):
    with pytest.raises(DataError, match=r"1 of 1 prompts are longer"):
        PromptDataset(records(LONG_AND_SHORT[0]), tokenizer, prompt_max_len=20)


def test_a_prompt_of_exactly_the_limit_stays(tokenizer: Any):
    ids = tokenizer("1 2 3 4")["input_ids"]
    data = PromptDataset(records({"input": "1 2 3 4", "label": ""}), tokenizer, prompt_max_len=len(ids))
    assert data[0].prompt_token_ids == ids


def test_several_sources_are_blended_by_their_shares(tokenizer: Any, tmp_path: Path):
    specs = [
        write(tmp_path / f"{name}.jsonl", [{"input": f"{name}{n}", "label": ""} for n in range(100)]) for name in "ab"
    ]

    def blend(seed: int) -> list[str]:
        data = build_prompt_dataset(",".join(specs), tokenizer, prompt_data_probs="0.8,0.2", max_samples=50, seed=seed)
        return [prompt.prompt for prompt in data]

    prompts = blend(1)
    assert len(prompts) == len(set(prompts)) == 50
    assert sum(prompt.startswith("a") for prompt in prompts) == 40
    assert prompts == blend(1) != blend(2)


def test_everything_comes_from_the_configuration(tokenizer: Any, tmp_path: Path):
    train = write(tmp_path / "train.jsonl", [{"q": f"{n}", "a": n} for n in range(6)])
    test = write(tmp_path / "test.jsonl", [{"q": "9", "a": 9}, {"q": "8", "a": 8}])
    config = StrategyConfig(
        prompt_data=train,
        eval_data=test,
        input_key="q",
        label_key="a",
        max_samples=4,
        max_eval_samples=1,
        input_template="Q: {} A:",
        engine_type="hf",
    )
    assert [p.prompt for p in prompt_dataset_from_config(config, tokenizer)] == [f"Q: {n} A:" for n in range(4)]
    assert [p.label for p in prompt_dataset_from_config(config, tokenizer, evaluation=True)] == [9]
    with pytest.raises(DataError, match=r"--eval_data is not given"):
        prompt_dataset_from_config(StrategyConfig(prompt_data=train, engine_type="hf"), tokenizer, evaluation=True)


def test_chats_are_rendered_as_the_configuration_says(tokenizer: Any, tmp_path: Path):
    data = write(tmp_path / "train.jsonl", [{"input": "hi", "label": ""}])
    config = StrategyConfig(prompt_data=data, apply_chat_template=True, system_prompt="Be brief.", engine_type="hf")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert [prompt.prompt for prompt in prompt_dataset_from_config(config, tokenizer)] == [rendered]


def test_training_and_held_out_prompts_come_from_their_splits(tokenizer: Any):
    def prompts(split: str, **settings: Any) -> list[str]:
        config = StrategyConfig(prompt_data=TASK, eval_data=TASK, max_samples=8, max_eval_samples=8, **settings)
        return [p.prompt for p in prompt_dataset_from_config(config, tokenizer, evaluation=split == "eval_split")]

    for split, other in (("prompt_split", "test"), ("eval_split", "train")):
        direct = build_prompt_dataset(TASK, tokenizer, split=other, max_samples=8)
        assert prompts(split, **{split: other}) == [p.prompt for p in direct] != prompts(split)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval_data": "gone.jsonl"}, r"^--eval_data gone\.jsonl: no such file"),
        ({"eval_data": "./gone"}, r"^--eval_data \./gone: no such file or folder"),
        ({"eval_data": "a.csv"}, r"^--eval_data a\.csv: a \.csv file"),
        ({"eval_data": "broken.jsonl"}, r"^--eval_data broken\.jsonl: 1 fault\n"),
        ({"eval_data": "broken.parquet"}, r"^--eval_data broken\.parquet: not readable as Parquet"),
        ({"eval_data": "empty.jsonl"}, r"^--eval_data empty\.jsonl: it has no records"),
        ({"eval_data": "keyless.jsonl"}, r"^--eval_data: 1 fault\n"),
        ({"eval_data": "task:sort"}, r"^--eval_data task:sort: no such task"),
        ({"eval_data": "task:reverse_digits", "eval_split": "val"}, r"^--eval_split val: .* train, test"),
        ({"eval_data": "reasoning_gym:none"}, r"^--eval_data reasoning_gym:none: reasoning-gym has no"),
        ({"eval_data": "good.jsonl,good.jsonl", "max_eval_samples": 1}, r"^--max_eval_samples 1: .* of --eval_data"),
        ({"eval_data": ","}, r"^--eval_data is empty"),
    ],
)
def test_faults_of_held_out_prompts_name_their_own_flags(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
):
    monkeypatch.chdir(tmp_path)
    texts = {"broken.jsonl": "{", "empty.jsonl": "", "keyless.jsonl": "{}", "a.csv": "", "broken.parquet": "no"}
    for name, text in {**texts, "good.jsonl": '{"input": "1", "label": "1"}'}.items():
        (tmp_path / name).write_text(text)
    config = StrategyConfig(prompt_data="good.jsonl", engine_type="hf", **settings)
    with pytest.raises(DataError, match=said) as caught:
        prompt_dataset_from_config(config, tokenizer, evaluation=True)
    assert "--prompt" not in str(caught.value) and "--max_samples" not in str(caught.value)


def test_the_default_task_is_a_dataset_like_any_other():
    data = build_prompt_dataset(TASK, build_tokenizer(), split="test", prompt_max_len=8)
    assert len(data) == 512
    assert data[0].label == data[0].prompt[:-1][::-1]
    assert len(data[0].prompt_token_ids) == 5


def test_images_are_found_beside_the_file_and_opened_when_needed(tokenizer: Any, tmp_path: Path):
    Image.new("RGBA", (4, 4), "red").save(tmp_path / "red.png")
    lines = [
        {"input": "<image> colour?", "label": "red", "image": "red.png"},
        {"input": "none", "label": "", "image": None},
    ]
    data = build_prompt_dataset(
        write(tmp_path / "a.jsonl", lines),
        tokenizer,
        images_key="image",
        prompt_format=PromptFormat(apply_chat_template=True),
    )
    images = data[0].images
    assert images is not None and [image.mode for image in images] == ["RGB"]
    assert "<|image_pad|>" in data[0].prompt
    assert data[1].images is None


def test_a_missing_image_is_named_when_the_dataset_is_read(tokenizer: Any, tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"input": "?", "label": "", "image": ["gone.png"]}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: no image .*gone\.png"):
        build_prompt_dataset(path, tokenizer, images_key="image")


def test_images_that_a_text_model_leaves_out_are_logged(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lines = [{"input": "?", "label": ""}, {"input": "?", "label": "", "image": ["gone.png"]}]
    for count in (1, 2):
        path = write(tmp_path / f"{count}.jsonl", lines[:count])
        prompts = list(build_prompt_dataset(path, tokenizer, images_key="image", takes_images=False))
        assert [prompt.images for prompt in prompts] == [None] * count
        assert ("images, under the key 'image', are left out: `lightrft train-vl`" in caplog.text) == (count == 2)


def test_a_broken_image_is_named_when_it_is_opened(tokenizer: Any, tmp_path: Path):
    (tmp_path / "bad.png").write_text("no")
    path = write(tmp_path / "a.jsonl", [{"input": "?", "label": "", "image": "bad.png"}])
    data = build_prompt_dataset(path, tokenizer, images_key="image")
    with pytest.raises(DataError, match=r"a\.jsonl:1: cannot open image"):
        data[0]


def test_images_saved_by_datasets_are_read(tokenizer: Any, tmp_path: Path):
    import datasets

    table = datasets.Dataset.from_dict(
        {"input": ["?"], "label": ["red"], "image": [Image.new("RGB", (4, 4), "red")]},
        features=datasets.Features(
            {"input": datasets.Value("string"), "label": datasets.Value("string"), "image": datasets.Image()}
        ),
    )
    table.save_to_disk(str(tmp_path / "saved"))
    images = build_prompt_dataset(str(tmp_path / "saved"), tokenizer, images_key="image")[0].images
    assert images is not None and images[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_dataset_travels_to_a_worker_process(tokenizer: Any):
    data = PromptDataset(records({"input": "1", "label": "1"}), tokenizer)
    assert pickle.loads(pickle.dumps(data))[0] == data[0]
