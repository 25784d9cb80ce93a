"""From a record's input to the model's text: template, system prompt, chat template, images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .records import DataError

IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How prompts are rendered.

    :param input_template: text with ``{}`` in place of the input; other braces are kept.
    :param system_prompt: a system message; needs the chat template.
    :param apply_chat_template: wrap the input as a user's message with the tokenizer's (or processor's) chat template.
    :raises DataError: a template without ``{}``, or a system prompt without the chat template.
    """

    input_template: str | None = None
    system_prompt: str | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        if self.input_template is not None and "{}" not in self.input_template:
            raise DataError(f"--input_template {self.input_template!r}: write {{}} where the input belongs")
        if self.system_prompt is not None and not self.apply_chat_template:
            raise DataError("--system_prompt: it is a message of the chat template; add --apply_chat_template")

    def check(self, tokenizer: Any) -> None:
        """:raises DataError: a chat template is requested, but ``tokenizer`` has none."""
        if self.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"--apply_chat_template: {type(tokenizer).__name__} of "
                f"{getattr(tokenizer, 'name_or_path', '') or 'this model'} "
                "has no chat template; drop the flag and use --input_template"
            )

    def render(self, value: Any, tokenizer: Any, *, images: int = 0) -> str:
        """The prompt's text.

        :param value: a string, or (with the chat template) a list of messages ``{"role": …, "content": …}``.
        :param images: how many images come with it. ``<image>`` in the text marks where each belongs; without marks
            they come first.
        :raises DataError: another type, or a different number of marks and images.
        """
        if isinstance(value, str):
            text = value if self.input_template is None else self.input_template.replace("{}", value)
            if not self.apply_chat_template:
                return text
            messages: list[dict[str, Any]] = [{"role": "user", "content": _content(text, images)}]
        elif _is_messages(value):
            if not self.apply_chat_template:
                raise DataError("the input is a list of messages; add --apply_chat_template")
            if self.input_template is not None:
                raise DataError("the input is a list of messages, which --input_template cannot wrap; drop it")
            messages = [dict(message) for message in value]
        else:
            raise DataError(
                f"the input is a {type(value).__name__}; it must be text or a list of messages with role and content"
            )
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _content(text: str, images: int) -> str | list[dict[str, Any]]:
    if not images:
        return text
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        pieces = [""] * images + [text]
    if len(pieces) != images + 1:
        raise DataError(f"the input marks {len(pieces) - 1} places with {IMAGE_MARK} for {images} images")
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    return content
