from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lightrft.data import DataError, Record, read_source

LINES = [{"input": f"{n} + {n} =", "label": str(2 * n)} for n in range(5)]


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def values(records: list[Record]) -> list[Any]:
    return [dict(record.values) for record in records]


def read(spec: str | Path, limit: int = 1000, **options: Any) -> list[Record]:
    return read_source(str(spec), limit=limit, **options)


def test_jsonl_lines_keep_their_numbers_over_empty_lines(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [LINES[0], "", "   ", LINES[1]])
    records = read(path)
    assert values(records) == LINES[:2]
    assert [record.origin for record in records] == [f"{path}:1", f"{path}:4"]


def test_a_byte_order_mark_and_a_missing_last_line_end_are_fine(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LINES[0]).encode())
    assert values(read(path)) == LINES[:1]


def test_all_broken_lines_are_named_at_once(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [LINES[0], '{"input": "x"', "[1]", LINES[1], '"text"'])
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert "3 faults" in text
    assert f"{path}:2: not JSON" in text and "column 14" in text
    assert f"{path}:3: a list; each line must be an object" in text
    assert f"{path}:5: a str" in text


def test_many_broken_lines_are_counted_not_listed(tmp_path: Path):
    with pytest.raises(DataError, match=r"20 faults") as caught:
        read(write_jsonl(tmp_path / "a.jsonl", ["{"] * 20))
    assert "… and 15 more" in str(caught.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not UTF-8 at byte 11"):
        read(path)


def test_a_text_that_was_cut_within_a_character_is_named(tmp_path: Path):
    lines = [r'{"input": "whole \ud83d\ude00 \\ud83d"}', r'{"input": "cut \ud83d"}', r'{"a": ["\uDE00"], "input": "1"}']
    with pytest.raises(DataError, match=r"2 faults") as caught:
        read(write_jsonl(tmp_path / "a.jsonl", lines))
    assert r"a.jsonl:2: '\ud83d' is half of a character, which no tokenizer takes" in str(caught.value)
    assert r"a.jsonl:3: '\ude00' is half" in str(caught.value)


def test_the_limit_stops_the_reading_before_what_comes_after(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [*LINES[:2], "{broken"])
    assert values(read(path, limit=2)) == LINES[:2]


def test_an_empty_file_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no records"):
        read(write_jsonl(tmp_path / "a.jsonl", ["", ""]))


def test_parquet_rows_come_in_order(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LINES), path, row_group_size=2)
    records = read(path, limit=3)
    assert values(records) == LINES[:3]
    assert records[2].origin == f"{path}[2]"


def test_a_file_that_is_no_parquet_is_an_error(tmp_path: Path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match=r"not readable as Parquet"):
        read(tmp_path / "a.parquet")


def test_a_saved_dataset_has_splits(tmp_path: Path):
    import datasets

    train = datasets.Dataset.from_list(LINES)
    datasets.DatasetDict({"train": train, "test": train.select([4])}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert values(read(tmp_path / "both", split="test")) == LINES[4:]
    assert values(read(tmp_path / "one")) == LINES
    with pytest.raises(DataError, match=r"--prompt_split dev: .* has the splits train, test"):
        read(tmp_path / "both", split="dev")


def test_a_folder_of_files_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", LINES[:3])
    write_jsonl(folder / "test.jsonl", LINES[3:])
    assert values(read(folder, split="test")) == LINES[3:]


def test_a_name_that_is_nothing_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def offline(name: str, config: str | None) -> None:
        raise ConnectionError(f"no way to {name} {config}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"neither a file or folder nor a dataset.*ConnectionError: no way to openai/gsm8k main"
    ):
        read("openai/gsm8k:main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("./missing", "no such file or folder"),
        ("a.csv", r"a \.csv file; supported are \.jsonl, \.parquet"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("input\n1\n")
    with pytest.raises(DataError, match=message):
        read(name)


@pytest.mark.parametrize("name", ["pipe.jsonl", "./pipe"])
def test_a_pipe_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    with pytest.raises(DataError, match="no regular file, and every rank has to read it; write it to one first"):
        read(name)


def test_the_built_in_task_has_two_splits_under_the_keys_asked_for():
    train = read("task:reverse_digits", limit=20_000, input_key="q", label_key="a")
    test = read("task:reverse_digits", limit=20_000, split="test", input_key="q", label_key="a")
    assert len(train) + len(test) == 10_000
    assert not {r.values["q"] for r in train} & {r.values["q"] for r in test}
    assert set(train[0].values) == {"q", "a"}
    with pytest.raises(DataError, match=r"task:reverse_digits"):
        read("task:sort")
    with pytest.raises(DataError, match=r"train, test"):
        read("task:reverse_digits", split="dev")


def test_reasoning_gym_entries_are_their_own_labels():
    records = read("reasoning_gym:chain_sum?size=4&min_terms=2&max_terms=2", input_key="q", label_key="a")
    assert len(records) == 4
    for record in records:
        assert record.values["q"] == record.values["a"]["question"]
        assert record.values["a"]["metadata"]["source_dataset"] == "chain_sum"
        assert record.values["a"]["metadata"]["num_terms"] == 2


def test_reasoning_gym_splits_and_seeds_differ_and_repeat():
    def questions(**options: Any) -> list[str]:
        return [record.values["input"] for record in read("reasoning_gym:chain_sum", limit=8, **options)]

    assert questions() == questions()
    assert questions() != questions(split="test")
    assert questions() != questions(seed=1)


def test_unknown_reasoning_gym_names_and_options_are_answered():
    with pytest.raises(DataError, match=r"no 'chain_sums'; it has .*chain_sum"):
        read("reasoning_gym:chain_sums")
    with pytest.raises(DataError, match=r"does not take these options"):
        read("reasoning_gym:chain_sum?terms=3")
    with pytest.raises(DataError, match=r"does not take these options"):
        read("reasoning_gym:chain_sum?min_terms=9&max_terms=2")


@pytest.mark.skipif(find_spec("pycosat") is not None, reason="pip uninstall pycosat to see what is said without it")
def test_zebra_puzzles_without_their_solver_say_what_to_install():
    with pytest.raises(DataError, match=r"zebra_puzzles.*: its zebra puzzles need pycosat: pip install pycosat"):
        read("reasoning_gym:zebra_puzzles?size=1")
    assert "pycosat" not in sys.modules, "nobody else must take the stand-in for the real thing"
