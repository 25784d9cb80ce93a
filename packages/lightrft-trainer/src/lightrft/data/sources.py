"""Records of ``--prompt_data``: a file, a folder, a dataset's name, a generated task."""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl

from .paths import fault_of_file, fault_of_folder
from .reasoning_gym import import_reasoning_gym
from .records import TRAINING_FLAGS, DataError, DataFlags, Record, raise_faults
from .tasks import reverse_digits

TASK_PREFIX = "task:"
REASONING_GYM_PREFIX = "reasoning_gym:"
REASONING_GYM_SIZE = 1000
TASKS = {"reverse_digits": reverse_digits}


def read_source(
    spec: str,
    *,
    split: str = "train",
    input_key: str = "input",
    label_key: str | None = "label",
    limit: int,
    seed: int = 42,
    flags: DataFlags = TRAINING_FLAGS,
) -> list[Record]:
    """At most ``limit`` records of one source.

    :param spec: one of

        - a ``.jsonl`` or ``.parquet`` file, which has only one split, whatever ``split`` is;
        - a folder: a dataset that ``save_to_disk`` wrote, or files that ``datasets.load_dataset`` understands;
        - ``NAME`` or ``NAME:CONFIG`` of a Hugging Face dataset (``openai/gsm8k:main``);
        - ``reasoning_gym:TASK``, or with options ``reasoning_gym:chain_sum?size=500&min_terms=2``; its labels are whole
          entries;
        - ``task:reverse_digits``, the built-in task, with splits ``train`` and ``test``.
    :param input_key: generated tasks put their question under this key, and their label under ``label_key``.
    :param flags: names of the flags, for messages.
    :raises DataError: it does not exist, cannot be read, or has no records.
    """
    spec = spec.strip()
    asked = f"{flags.data} {spec}"
    if spec.startswith(TASK_PREFIX):
        records: Iterable[Record] = _task(spec, split, flags, input_key, label_key, seed)
    elif spec.startswith(REASONING_GYM_PREFIX):
        records = _reasoning_gym(spec, split, flags, input_key, label_key, limit, seed)
    else:
        path = pathlib.Path(os.path.expanduser(spec))
        fault = fault_of_file(path)
        if path.suffix in _FILE_READERS:
            if fault is not None:
                raise DataError(f"{asked}: {fault} (from {pathlib.Path.cwd()})")
            records = _FILE_READERS[path.suffix](path, limit, asked)
        elif fault is None:
            raise DataError(f"{asked}: a {path.suffix or 'nameless'} file; supported are {', '.join(_FILE_READERS)}")
        elif fault_of_folder(path) is not None and os.path.exists(path):
            raise DataError(f"{asked}: {fault}")
        else:
            records = _hugging_face(spec, path, split, flags)
    found = list(islice(records, limit))
    if not found:
        raise DataError(f"{asked}: it has no records")
    return found


def _jsonl(path: pathlib.Path, limit: int, asked: str) -> Iterator[Record]:
    """Objects of a JSONL file; empty lines count as lines but not as records."""
    records, faults = [], []
    folder = str(path.parent)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if len(records) == limit:
                break
            if not line.strip():
                continue
            try:
                values = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                faults.append(f"{path}:{number}: not UTF-8 at byte {error.start} of the line")
                continue
            except json.JSONDecodeError as error:
                faults.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
                continue
            if not isinstance(values, dict):
                faults.append(
                    f'{path}:{number}: a {type(values).__name__}; each line must be an object, {{"input": …}}'
                )
                continue
            if rb"\ud" in line.lower() and (half := _half_character(values)):
                faults.append(f"{path}:{number}: {half} is half of a character, which no tokenizer takes")
                continue
            records.append(Record(values, f"{path}:{number}", folder))
    raise_faults(faults, asked)
    return iter(records)


def _half_character(values: Any) -> str | None:
    """What a text has left that was cut within an escaped emoji, or None."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])
    return None


def _parquet(path: pathlib.Path, limit: int, asked: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            return iter([Record(row, f"{path}[{n}]", str(path.parent)) for n, row in enumerate(islice(rows, limit))])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{asked}: not readable as Parquet: {error}") from error


_FILE_READERS: dict[str, Callable[[pathlib.Path, int, str], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _hugging_face(spec: str, path: pathlib.Path, split: str, flags: DataFlags) -> Iterator[Record]:
    import datasets

    asked = f"{flags.data} {spec}"
    if fault_of_folder(path) is None:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
        else:
            loaded = _load_dataset(asked, str(path), None)
        folder = str(path)
    else:
        if spec.startswith(("/", "./", "../", "~")):
            raise DataError(f"{asked}: no such file or folder (from {pathlib.Path.cwd()})")
        name, _, config = spec.partition(":")
        loaded, folder = _load_dataset(asked, name, config or None), None
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{flags.split} {split}: {spec} has the splits {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    # Pictures stay encoded until they are needed.
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    return (Record(values, f"{spec}[{number}]", folder) for number, values in enumerate(loaded))


def _load_dataset(asked: str, name: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config)
    # Any error of the hub, the network or a builder means that this dataset cannot be loaded.
    except Exception as error:
        raise DataError(
            f"{asked}: neither a file or folder nor a dataset that can be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error


def _task(
    spec: str, split: str, flags: DataFlags, input_key: str, label_key: str | None, seed: int
) -> Iterator[Record]:
    name = spec.removeprefix(TASK_PREFIX)
    if name not in TASKS:
        raise DataError(f"{flags.data} {spec}: no such task; there are {', '.join(TASK_PREFIX + t for t in TASKS)}")
    questions = TASKS[name](seed=seed)
    parts = {"train": questions.train, "test": questions.held_out}
    if split not in parts:
        raise DataError(f"{flags.split} {split}: {spec} has the splits {', '.join(parts)}")
    for number, example in enumerate(parts[split]):
        values = {input_key: example.prompt}
        if label_key is not None:
            values[label_key] = example.label
        yield Record(values, f"{spec}[{number}]")


def _reasoning_gym(
    spec: str, split: str, flags: DataFlags, input_key: str, label_key: str | None, limit: int, seed: int
) -> Iterator[Record]:
    name, _, query = spec.removeprefix(REASONING_GYM_PREFIX).partition("?")
    asked = f"{flags.data} {spec}"
    try:
        gym = import_reasoning_gym()
    except ModuleNotFoundError as error:
        raise DataError(f"{asked} needs {error.name}: pip install 'lightrft-trainer[reasoning-gym]'") from error
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"{asked}: reasoning-gym has no {name!r}; it has {', '.join(sorted(DATASETS))}")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    # Each split draws its own questions; in a small task some may be in both.
    options.setdefault("seed", seed if split == "train" else zlib.crc32(f"{seed}/{split}".encode()))
    options.setdefault("size", min(limit, REASONING_GYM_SIZE))
    try:
        dataset = gym.create_dataset(name, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(f"{asked}: {name} does not take these options: {error}") from error
    for number in range(len(dataset)):
        try:
            entry = dataset[number]
        except ModuleNotFoundError as error:
            raise DataError(f"{asked}: {error}") from error
        values = {**entry, input_key: entry["question"]}
        if label_key is not None:
            values[label_key] = entry
        yield Record(values, f"{REASONING_GYM_PREFIX}{name}[{number}]")
