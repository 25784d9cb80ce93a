"""Records, which every source of prompts yields, and the error that names a faulty one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightrft.strategy.errors import LightRFTError

SHOWN_FAULTS = 5


class DataError(LightRFTError, ValueError):
    """A dataset cannot be read or lacks something; the message names the file and the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class DataFlags:
    """The flags for a dataset, its split and its limit, for messages."""

    data: str = "--prompt_data"
    split: str = "--prompt_split"
    limit: str = "--max_samples"


TRAINING_FLAGS = DataFlags()
EVALUATION_FLAGS = DataFlags("--eval_data", "--eval_split", "--max_eval_samples")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One line of a dataset.

    :param values: its keys and values. :param origin: its place, for messages: ``train.jsonl:12`` or
        ``gsm8k[12]``.
    :param folder: base of relative image paths; None: the current directory.
    """

    values: Mapping[str, Any]
    origin: str
    folder: str | None = None


def raise_faults(faults: Sequence[str], what: str) -> None:
    """One error for all faults of a dataset, the first few in full.

    :raises DataError: there is a fault.
    """
    if not faults:
        return
    more = [f"  … and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise DataError("\n".join([f"{what}: {count}", *(f"  {fault}" for fault in faults[:SHOWN_FAULTS]), *more]))
