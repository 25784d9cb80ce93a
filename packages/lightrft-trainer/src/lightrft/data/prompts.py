"""The prompts of a run as a map-style dataset."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset

from .blending import blend_counts, choose, parse_shares
from .images import image_references, open_image
from .records import EVALUATION_FLAGS, TRAINING_FLAGS, DataError, DataFlags, Record, raise_faults
from .rendering import PromptFormat
from .sources import read_source

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig

logger = logging.getLogger(__name__)

TOKENIZED_AT_ONCE = 1000
NAMED_PROMPTS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a dataset.

    :param index: its position in the whole dataset, the same on every rank and in every epoch.
    :param prompt: the rendered text. :param prompt_token_ids: its tokens.
    :param label: the reference answer for the reward; None if the dataset has none.
    :param images: its images in RGB, or None. :param origin: file and line, for messages.
    """

    index: int
    prompt: str
    prompt_token_ids: list[int]
    label: Any = None
    images: list[Any] | None = None
    origin: str = ""


class PromptDataset(Dataset[Prompt]):
    """Prompts from records, rendered and tokenized once.

    A prompt of more than ``prompt_max_len`` tokens is skipped, and their number and the places of the first ones are
    logged; ``overlong="refuse"`` makes it an error instead. Nothing is truncated. Image tokens that a processor
    adds are not counted.

    :param records: see :func:`lightrft.data.sources.read_source`.
    :param tokenizer: a tokenizer, or a processor that has one.
    :param input_key: key of the prompt. :param label_key: key of the label; None: no labels.
    :param labels_optional: if no record has a label, the dataset has no labels, which is logged. If only some lack it,
        each of those is a fault.
    :param images_key: key of the images; records may lack it.
    :param takes_images: False leaves them out, which is logged.
    :param prompt_max_len: longest prompt in tokens.
    :param flags: names of the dataset's flags, for messages.
    :raises DataError: a record lacks a key or cannot be rendered (all such records are counted, the first ones
        named), or no prompt is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        *,
        input_key: str = "input",
        label_key: str | None = "label",
        labels_optional: bool = False,
        images_key: str | None = None,
        takes_images: bool = True,
        prompt_format: PromptFormat | None = None,
        prompt_max_len: int = 1024,
        overlong: Literal["drop", "refuse"] = "drop",
        flags: DataFlags = TRAINING_FLAGS,
    ) -> None:
        prompt_format = prompt_format or PromptFormat()
        prompt_format.check(tokenizer)
        if labels_optional and label_key and all(record.values.get(label_key) is None for record in records):
            keys = ", ".join(map(repr, dict.fromkeys(key for record in records for key in record.values)))
            logger.warning(
                "%s: no line has a label under the key %r, so rewards get None as labels; the lines have "
                "%s (--label_key)",
                flags.data,
                label_key,
                keys,
            )
            label_key = None
        if not takes_images and images_key:
            if any(record.values.get(images_key) for record in records):
                logger.warning("images, under the key %r, are left out: `lightrft train-vl` takes them", images_key)
            images_key = None
        faults: list[str] = []
        rendered: list[tuple[Record, str, Any, list[Any]]] = []
        for record in records:
            missing = [key for key in (input_key, label_key) if key is not None and record.values.get(key) is None]
            if missing:
                faults.append(_missing_key(record, missing, input_key))
                continue
            try:
                images = image_references(record, images_key)
                text = prompt_format.render(record.values[input_key], tokenizer, images=len(images))
            except DataError as error:
                faults.append(f"{record.origin}: {error}")
                continue
            if not text:
                faults.append(f"{record.origin}: the prompt is empty")
                continue
            rendered.append((record, text, None if label_key is None else record.values[label_key], images))
        raise_faults(faults, flags.data)
        ids = tokenize_prompts(
            tokenizer, [text for _, text, _, _ in rendered], special=not prompt_format.apply_chat_template
        )
        self._prompts: list[Prompt] = []
        self.dropped: list[str] = []
        """Where the prompts stand that were too long."""
        for (record, text, label, images), token_ids in zip(rendered, ids, strict=True):
            if len(token_ids) > prompt_max_len:
                self.dropped.append(f"{record.origin} ({len(token_ids)} tokens)")
                continue
            self._prompts.append(Prompt(len(self._prompts), text, token_ids, label, images or None, record.origin))
        self._settle_overlong(prompt_max_len, overlong)

    def _settle_overlong(self, prompt_max_len: int, overlong: Literal["drop", "refuse"]) -> None:
        if not self.dropped:
            return
        total = len(self.dropped) + len(self._prompts)
        named = ", ".join(self.dropped[:NAMED_PROMPTS]) + (", …" if len(self.dropped) > NAMED_PROMPTS else "")
        found = f"{len(self.dropped)} of {total} prompts are longer than --prompt_max_len {prompt_max_len}: {named}"
        if overlong == "refuse" or not self._prompts:
            raise DataError(f"{found}; raise --prompt_max_len")
        logger.warning("%s; they are skipped", found)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        """:raises DataError: an image cannot be opened."""
        prompt = self._prompts[index]
        if prompt.images is None:
            return prompt
        try:
            return dataclasses.replace(prompt, images=[open_image(reference) for reference in prompt.images])
        except DataError as error:
            raise DataError(f"{prompt.origin}: {error}") from error

    @functools.cached_property
    def digest(self) -> str:
        """Of the prompts in their order, to notice that a resumed run has others."""
        found = hashlib.blake2b(digest_size=16)
        for prompt in self._prompts:
            found.update(prompt.prompt.encode() + b"\0")
        return found.hexdigest()

    @staticmethod
    def collate_fn(items: list[Prompt]) -> list[Prompt]:
        """A batch is a list of prompts."""
        return list(items)


def _missing_key(record: Record, missing: Sequence[str], input_key: str) -> str:
    flags = " and ".join("--input_key" if key == input_key else "--label_key" for key in missing)
    absent = [key for key in missing if key not in record.values]
    what = f"no {' and no '.join(map(repr, absent))}" if absent else f"{' and '.join(map(repr, missing))} is null"
    return f"{record.origin}: {what}; it has {', '.join(map(repr, record.values)) or 'no key'} ({flags})"


def tokenize_prompts(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of prompts, without padding and without a limit.

    :param tokenizer: a tokenizer, or a processor that has one.
    :param special: add what the tokenizer adds to a plain text (a chat template has written it already).
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids: list[list[int]] = []
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        part = list(texts[start : start + TOKENIZED_AT_ONCE])
        ids += tokenizer(part, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def build_prompt_dataset(
    prompt_data: str,
    tokenizer: Any,
    *,
    prompt_data_probs: str | None = None,
    split: str = "train",
    max_samples: int = 1_000_000,
    seed: int = 42,
    input_key: str = "input",
    label_key: str | None = "label",
    flags: DataFlags = TRAINING_FLAGS,
    **options: Any,
) -> PromptDataset:
    """The dataset that ``--prompt_data`` names: one source, or several separated by commas.

    :param prompt_data_probs: shares of several sources (see :func:`lightrft.data.blending.blend_counts`).
    :param max_samples: most prompts, over all sources. :param seed: decides which prompts of a source a blend takes.
    :param options: of :class:`PromptDataset`.
    :raises DataError: see there.
    """
    specs = [spec for spec in (part.strip() for part in prompt_data.split(",")) if spec]
    if not specs:
        raise DataError(f"{flags.data} is empty")
    shares = parse_shares(prompt_data_probs, len(specs))
    sources = [
        read_source(
            spec, split=split, input_key=input_key, label_key=label_key, limit=max_samples, seed=seed, flags=flags
        )
        for spec in specs
    ]
    counts = blend_counts([len(source) for source in sources], shares, max_samples, flags)
    records: list[Record] = []
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        records += [source[position] for position in choose(len(source), count, seed + number)]
    if len(specs) > 1:
        logger.info("prompts: %s", ", ".join(f"{count} of {spec}" for spec, count in zip(specs, counts, strict=True)))
    return PromptDataset(records, tokenizer, input_key=input_key, label_key=label_key, flags=flags, **options)


def prompt_dataset_from_config(
    config: StrategyConfig, tokenizer: Any, *, evaluation: bool = False, **overrides: Any
) -> PromptDataset:
    """The training prompts that a configuration names, or with ``evaluation`` its held-out ones.

    :param overrides: of :func:`build_prompt_dataset`, for example ``label_key=None`` where the reward needs no label.
    :raises DataError: see there; also where the configuration names no such data.
    """
    prompt_data = config.eval_data if evaluation else config.prompt_data
    flags = EVALUATION_FLAGS if evaluation else TRAINING_FLAGS
    if prompt_data is None:
        raise DataError(f"{flags.data} is not given")
    options: Mapping[str, Any] = {
        "prompt_data_probs": None if evaluation else config.prompt_data_probs,
        "split": config.eval_split if evaluation else config.prompt_split,
        "max_samples": config.max_eval_samples if evaluation else config.max_samples,
        "seed": config.seed,
        "input_key": config.input_key,
        "label_key": config.label_key,
        "images_key": config.images_key,
        "prompt_format": PromptFormat(
            input_template=config.input_template,
            system_prompt=config.system_prompt,
            apply_chat_template=config.apply_chat_template,
        ),
        "prompt_max_len": config.prompt_max_len,
        "flags": flags,
    }
    return build_prompt_dataset(prompt_data, tokenizer, **{**options, **overrides})
