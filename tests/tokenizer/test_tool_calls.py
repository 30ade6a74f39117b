"""Calls of tools in texts: none is lost, none is made up, however the text is divided."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyspec_jax import demo
from easyspec_jax.tokenizer import load_tokenizer
from easyspec_jax.tokenizer.tool_calls import (
    ToolCall,
    ToolCallParser,
    _Scan,
    takes_tools,
    writes_tool_calls,
)

ADD = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "to": "</tool_call>\\""}}\n</tool_call>'
ADDED = ToolCall("add", '{"x": 1, "to": "</tool_call>\\""}')
NOW = '<tool_call>{"name": "now"}</tool_call>'
ESCAPED = '<tool_call>{"name": "f", "arguments": {"x": "\\"</tool_call>"}}</tool_call>'

HERMES = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>"
    "{% endfor %} {% endfor %}"
)


def parsed(*parts):
    """Return what is said and called, with what is said next to each other joined."""
    parser, found = ToolCallParser(), []
    for one in [*(one for part in parts for one in parser.feed(part)), *parser.end()]:
        if isinstance(one, str) and found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", [" \n"]),
        ("a < b <tool", ["a < b <tool"]),
        (ADD, [ADDED]),
        (f"\n{ADD}\n{NOW}\n", [ADDED, ToolCall("now", "{}")]),
        (f"Wait.\n{ADD}\n\nDone. ", ["Wait.\n", ADDED, "\n\nDone. "]),
        # A model may end its turn without the end of a call.
        (ADD.removesuffix("</tool_call>"), [ADDED]),
        (ADD[:40], [ADD[:40]]),
        ('<tool_call>{"name": "é"}</tool_call>', [ToolCall("é", "{}")]),
    ],
)
def test_calls_are_told_from_text(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize(
    "inside",
    [
        "", "add", "[]", "5", "{}", '{"name": ""}', '{"name": 5}', '{"name": "f", "arguments": 5}',
        '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "[" * 5000,
        '{{"name": "f", "arguments": {}}}', '{"name": "f" "x}',
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(inside):
    text = f"a <tool_call>{inside}</tool_call>"
    assert parsed(text) == [text]


@pytest.mark.parametrize("inside", ["add(1)", '{"name": 5, "arguments": {}}'])
def test_a_call_after_one_that_is_none(inside):
    broken = f"<tool_call>{inside}</tool_call>"
    assert parsed(broken + NOW + " done") == [broken, ToolCall("now", "{}"), " done"]


def test_a_quote_that_is_never_closed_swallows_no_call():
    broken = '<tool_call>{"name": "f, "arguments": {}}</tool_call> or '
    assert parsed(broken + NOW) == [broken, ToolCall("now", "{}")]
    assert parsed("<tool_call>\n" + NOW) == ["<tool_call>\n", ToolCall("now", "{}")]


def test_a_tag_that_begins_no_call_holds_nothing_back():
    parser = ToolCallParser()
    assert "".join(map(str, parser.feed('Use <tool_call> tags like "this'))).endswith('"this')


def test_the_end_of_a_long_call_is_looked_for_once():
    """Not from its beginning for each token, which would take seconds."""
    scan = _Scan()
    for length in (100, 1000, 10_000):
        assert scan.end_of_call('<tool_call>{"name": "' + "a" * length) is None
        assert scan._at >= length


def test_calls_are_no_longer_looked_for_after_many_that_are_none(monkeypatch):
    """Each is searched to the end of the text, which would take minutes for a long one."""
    searched, real = [], _Scan.end_of_call
    monkeypatch.setattr(
        _Scan, "end_of_call", lambda self, text: (searched.append(text), real(self, text))[1]
    )
    text = '<tool_call>{"a":"b",' * 1000
    assert "".join(map(str, parsed(text))) == text
    assert len(searched) < 200
    few = "<tool_call>{1}</tool_call>" * 9
    assert parsed(few + NOW)[-1] == ToolCall("now", "{}")


PIECES = st.sampled_from(
    [ADD, NOW, "<tool_call>", "</tool_call>", "{", '"', "\\", " ", "\n", "a", '{"name": "f"}', "<"]
)


@given(st.lists(PIECES, max_size=6).map("".join), st.data())
@settings(deadline=None)
def test_it_does_not_matter_how_a_text_is_divided(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    parts = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    assert parsed(*parts) == parsed(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ESCAPED, [ToolCall("f", '{"x": "\\"</tool_call>"}')]),
        (NOW + " x", [ToolCall("now", "{}"), " x"]),
    ],
)
def test_a_text_may_be_cut_anywhere(text, expected):
    for cut in range(len(text)):
        assert parsed(text[:cut], text[cut:]) == expected


@given(st.lists(PIECES, max_size=6).map("".join))
@settings(deadline=None)
def test_nothing_is_lost(text):
    """Without calls the text comes back as it was."""
    found = parsed(text)
    if all(isinstance(one, str) for one in found):
        assert "".join(found) == text
    for one in found:
        if isinstance(one, ToolCall):
            assert isinstance(json.loads(one.arguments), dict)


def test_text_is_not_held_back_longer_than_needed():
    parser = ToolCallParser()
    assert parser.feed("a < b, <tool") == ["a < b, "]
    assert parser.feed("box>") == ["<toolbox>"]
    assert parser.feed(ADD + "b") == [ADDED, "b"]


@pytest.mark.parametrize(
    ("template", "takes", "writes"),
    [
        (None, False, False),
        (demo.CHAT_TEMPLATE, False, False),
        (HERMES, True, True),
        ("{{ tools | tojson }}{{ messages | tojson }}", True, False),
        # Tools are offered by a template of their own.
        ({"default": demo.CHAT_TEMPLATE, "tool_use": HERMES}, True, True),
        # Nobody knows what a template does that refuses to answer: a real request will tell.
        ("{{ raise_exception('no') }}", True, False),
    ],
)
def test_templates_that_know_tools(template, takes, writes):
    tokenizer = load_tokenizer(demo.TARGET)
    tokenizer.chat_template = template
    assert (takes_tools(tokenizer), writes_tool_calls(tokenizer)) == (takes, writes)
