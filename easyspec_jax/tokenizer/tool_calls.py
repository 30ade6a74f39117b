"""Calls of tools in a model's text, in the form that Hermes and Qwen write.

I will look that up.
<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from easyspec_jax.tokenizer.conversation import Conversation, rendered
from easyspec_jax.tokenizer.stream import Tokenizer

BEGIN, END = "<tool_call>", "</tool_call>"

_MOST_BROKEN = 64
"""Calls that are none after which no more are looked for: each is searched to the text's end."""

# A string of JSON may itself hold the end of a call, so strings are followed to their ends.
_QUOTE_OR_END = re.compile('"|' + END)
_ESCAPE_OR_QUOTE = re.compile(r'\\.|"', re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: The tool's name; it may be none of those that were offered.
        arguments: An object in JSON.
    """

    name: str
    arguments: str


class ToolCallParser:
    """Splits a growing text into what is said and the calls of tools in it.

    Each call is returned once it is complete. Text that looks like one but is not a JSON object
    with a name stays text. Blanks next to calls are dropped where nothing else is said.

    Examples:
        >>> parser = ToolCallParser()
        >>> parser.feed('Wait.<tool_call>{"name": "add", "argu')
        ['Wait.']
        >>> parser.feed('ments": {"x": 1}}</tool_call>') + parser.end()
        [ToolCall(name='add', arguments='{"x": 1}')]
    """

    def __init__(self) -> None:
        self._held = ""  # text that may be part of a call
        self._scan = _Scan()  # how far its end has been looked for
        self._blanks = ""  # blanks since the beginning or the latest call
        self._broken = 0  # beginnings of calls that were none
        self._silent = True  # whether there were only blanks since then
        self._called = False

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take further text and return what is certain now."""
        self._held += text
        return list(self._split(final=False))

    def end(self) -> list[str | ToolCall]:
        """Return what is left at the end of the text; a call may lack its end."""
        rest = list(self._split(final=True))
        return rest if self._called or not self._blanks else [*rest, self._blanks]

    def _split(self, final: bool) -> Iterator[str | ToolCall]:
        while self._held:
            begin = self._held.find(BEGIN) if self._broken < _MOST_BROKEN else -1
            if begin < 0:
                is_open = not final and self._broken < _MOST_BROKEN
                begin = len(self._held) - (_length_of_open_tag(self._held) if is_open else 0)
            yield from self._say(begin)
            inner = self._held.removeprefix(BEGIN).lstrip()
            if len(inner) < len(self._held) and inner and inner[0] != "{":
                yield from self._say(len(BEGIN))  # no call begins so
                continue
            end = self._scan.end_of_call(self._held)
            if end is None and not final:
                return
            end = len(self._held) if end is None else end
            call = _read_call(self._held[:end].removeprefix(BEGIN).removesuffix(END))
            if call is None:
                # A quote that is never closed swallows ends: a call may follow all the same.
                self._broken += 1
                following = self._held.find(BEGIN, 1)
                yield from self._say(end if following < 0 else min(end, following))
            else:
                self._held, self._blanks, self._scan = self._held[end:], "", _Scan()
                self._silent, self._called = True, True
                yield call

    def _say(self, length: int) -> Iterator[str]:
        """Yield the first characters of the held text, unless blanks are all that was said."""
        text, self._held = self._blanks + self._held[:length], self._held[length:]
        self._scan = _Scan() if length else self._scan
        self._silent = self._silent and not text.strip()
        self._blanks = text if self._silent else ""
        if text and not self._silent:
            yield text


def _length_of_open_tag(text: str) -> int:
    """Return the length of the longest end of a text that may become the beginning of a call."""
    lengths = range(len(BEGIN) - 1, 0, -1)
    return next((length for length in lengths if text.endswith(BEGIN[:length])), 0)


class _Scan:
    """A search for the end of a call, which goes on where it stopped when there is more text."""

    def __init__(self) -> None:
        self._at, self._quoted = 0, False  # all before is scanned; whether a string goes on there

    def end_of_call(self, text: str) -> int | None:
        """Return where the call ends with which a text begins; None if it goes on."""
        while True:
            pattern = _ESCAPE_OR_QUOTE if self._quoted else _QUOTE_OR_END
            found = pattern.search(text, self._at)
            if found is None:
                # What may be the beginning of a match is looked at again.
                open_end = 1 if text.endswith("\\") else 0
                open_end = open_end if self._quoted else len(END) - 1
                self._at = max(self._at, len(text) - open_end)
                return None
            if found[0] == END:
                return found.end()
            self._at = found.end()
            self._quoted ^= found[0] == '"'


def _read_call(text: str) -> ToolCall | None:
    """Parse the text between the tags; None if it is not a call."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    # A text may nest deeper than Python follows, and hold NaN, or numbers that are not finite.
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "easyspec_tool",
        "description": "easyspec",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}
_ASKED = {"role": "user", "content": "?"}
_CALL = ToolCall("easyspec_tool", '{"x": 1}')


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the chat template shows tools to the model."""
    try:
        texts = {
            rendered(tokenizer, Conversation([_ASKED], tools), add_generation_prompt=True)
            for tools in ((), (_TOOL,))
        }
    # A template may refuse this conversation; if it refuses a real one, the user will hear of it.
    except Exception:
        return bool(tokenizer.chat_template)
    return len(texts) == 2


def writes_tool_calls(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes earlier calls in the form that ToolCallParser reads.

    A model is trained on what its template writes.
    """
    function = {"name": _CALL.name, "arguments": json.loads(_CALL.arguments)}
    calls = [{"id": "easyspec1", "type": "function", "function": function}]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        # With the tool, because a checkpoint can have a template of its own for conversations
        # with tools.
        text = rendered(
            tokenizer, Conversation([_ASKED, answer], (_TOOL,)), add_generation_prompt=False
        )
    except Exception:
        return False
    return _CALL in ToolCallParser().feed(text)
