from __future__ import annotations

from typing import Any

import pytest

from lightrft.data import DataError, PromptFormat
from lightrft.testing.tiny_models import tiny_tokenizer


class ShowsMessages:
    """A chat template that shows what it was given."""

    chat_template = "yes"

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return repr(messages)


def test_plain_text_stays_as_it_is():
    assert PromptFormat().render("2 + 2 =", None) == "2 + 2 ="


def test_a_template_leaves_other_braces_alone():
    template = PromptFormat(input_template='Answer {"as": "json"}: {} \\boxed{x}')
    assert template.render("2 + 2 {}", None) == 'Answer {"as": "json"}: 2 + 2 {} \\boxed{x}'


def test_the_chat_template_ends_with_the_assistant_s_turn():
    text = PromptFormat(apply_chat_template=True, system_prompt="Be brief.").render("hello", tiny_tokenizer())
    assert text.index("Be brief.") < text.index("hello") < text.rindex("assistant")


def test_messages_of_the_dataset_are_used_and_keep_their_own_system_message():
    chat = PromptFormat(apply_chat_template=True, system_prompt="ours")
    own = [{"role": "system", "content": "theirs"}, {"role": "user", "content": "hi"}]
    assert chat.render(own, ShowsMessages()) == repr(own)
    assert chat.render(own[1:], ShowsMessages()) == repr([{"role": "system", "content": "ours"}, own[1]])


def test_images_come_where_they_are_marked_or_else_first():
    chat = PromptFormat(apply_chat_template=True)
    image = {"type": "image"}

    def content(text: str, images: int) -> Any:
        return eval(chat.render(text, ShowsMessages(), images=images))[0]["content"]

    assert content("what?", 2) == [image, image, {"type": "text", "text": "what?"}]
    assert content("this <image> or <image>", 2) == [
        {"type": "text", "text": "this "},
        image,
        {"type": "text", "text": " or "},
        image,
    ]
    assert content("what?", 0) == "what?"
    with pytest.raises(DataError, match=r"marks 1 places with <image> for 2 images"):
        content("<image>?", 2)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(DataError, match=r"where the input belongs"):
        PromptFormat(input_template="no place")
    with pytest.raises(DataError, match=r"add --apply_chat_template"):
        PromptFormat(system_prompt="Be brief.")
    with pytest.raises(DataError, match=r"has no chat template"):
        PromptFormat(apply_chat_template=True).check(object())


@pytest.mark.parametrize("value", [3, [], ["a"], [{"role": "user"}], None])
def test_an_input_of_another_type_is_refused(value: Any):
    with pytest.raises(DataError, match=r"must be text or a list of messages"):
        PromptFormat(apply_chat_template=True).render(value, ShowsMessages())


def test_messages_need_the_chat_template_and_no_other():
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(DataError, match=r"add --apply_chat_template"):
        PromptFormat().render(messages, None)
    with pytest.raises(DataError, match=r"--input_template cannot wrap"):
        PromptFormat(apply_chat_template=True, input_template="{}").render(messages, ShowsMessages())
