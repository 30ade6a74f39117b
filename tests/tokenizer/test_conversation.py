"""Conversations in the forms that users send, and ends of turns as templates write them."""

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer.conversation import (
    Conversation,
    conversation_of,
    end_of_turn_ids,
    from_template,
    with_system,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>", "<tool>")


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    letters = [*"abcdefghijklmnopqrstuvwxyz?{}\"':,. \n[]"]
    file = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    file.add_special_tokens(list(SPECIAL[:3]))
    file.add_tokens([AddedToken(text, special=False) for text in (SPECIAL[3], "\n\n\n")])
    return PreTrainedTokenizerFast(tokenizer_object=file, eos_token="</s>", chat_template=template)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }}\n\n <tool>{% endfor %}", "<tool>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        # An added token, but of blanks.
        ("{% for m in messages %}{{ m.content }}\n\n\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }} bye</s>{% endfor %}", None),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}</s>{% endif %}"
            "{% endfor %}",
            None,
        ),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% if %}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(template, ends):
    opened = tokenizer(template)
    assert end_of_turn_ids(opened) == (
        () if ends is None else (opened.convert_tokens_to_ids(ends),)
    )


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (USER, USER),
        (USER | {"content": [{"type": "text", "text": "hello"}]}, USER),
        (USER | {"content": [{"type": "text", "text": "a"}, "b"]}, USER | {"content": "a\nb"}),
        (
            USER | {"name": None, "refusal": None, "tool_calls": None, "weight": 0},
            USER | {"weight": 0},
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
            },
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "no JSON"}}, 7]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"arguments": "no JSON"}}, 7],
            },
        ),
        (
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
        ),
    ],
)
def test_messages_are_brought_into_the_form_of_templates(given, meant):
    assert conversation_of([USER, given]).messages == [USER, meant]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "list of messages"),
        (7, "list of messages"),
        (b"bytes", "list of messages"),
        (["hello"], "list of messages"),
        ([{"role": "user"}], "needs a role and a content"),
        ([{"content": "hello"}], "needs a role and a content"),
        ([{"role": 1, "content": "hello"}], "needs a role and a content"),
        ([USER | {"content": {"text": "hello"}}], "needs a role and a content"),
        ([USER | {"content": ""}], "the prompt is empty"),
        ([USER | {"content": []}], "the prompt is empty"),
        (
            [USER | {"content": [{"type": "image_url", "image_url": {}}]}],
            "one is of type 'image_url'",
        ),
        ([USER | {"content": [{"type": "text", "text": 7}]}], "one is of type 'text'"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "needs a role and a content"),
        (Conversation([USER], {"name": "f"}), "tools must be a list of objects"),  # pyright: ignore[reportArgumentType]
        (Conversation([USER], ["f"]), "tools must be a list of objects"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_is_no_conversation_is_refused(prompt, message):
    with pytest.raises(EasySpecError, match=message) as refusal:
        conversation_of(prompt)
    assert "\n" not in str(refusal.value)


def test_tools_and_further_fields_reach_the_template():
    template = "{% for t in tools %}{{ t.function.name }}{% endfor %}{{ messages[0].weight }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    conversation = conversation_of(Conversation([USER | {"weight": 3}], tools))
    assert from_template(tokenizer(template), conversation) == "f3"


def test_a_text_that_is_no_unicode_is_refused_wherever_it_comes_from():
    conversation = conversation_of([USER | {"name": "\udc00"}])
    with pytest.raises(EasySpecError, match="not valid Unicode"):
        from_template(tokenizer("{{ messages[0].name }}"), conversation)


def test_a_system_message_comes_first_unless_there_is_one():
    system = {"role": "system", "content": "be brief"}
    for prompt in ("hello", [USER], Conversation([USER])):
        assert list(with_system(prompt, "be brief").messages) == [system, USER]
    own = [{"role": "system", "content": "be long"}, USER]
    assert list(with_system(own, "be brief").messages) == own
