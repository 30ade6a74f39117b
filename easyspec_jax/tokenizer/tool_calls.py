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

# A string of JSON, which may itself hold the end of a call, or else that end. The text may stop
# inside a string, even right after a backslash.
_STRING_OR_END = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|' + END, re.DOTALL)


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
        self._blanks = ""  # blanks since the beginning or the latest call
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
            begin = self._held.find(BEGIN)
            if begin < 0:
                begin = len(self._held) - (0 if final else _length_of_open_tag(self._held))
            yield from self._say(begin)
            end = _end_of_call(self._held)
            if end is None and not final:
                return
            end = len(self._held) if end is None else end
            call = _read_call(self._held[:end].removeprefix(BEGIN).removesuffix(END))
            if call is None:
                yield from self._say(end)
            else:
                self._held, self._blanks = self._held[end:], ""
                self._silent, self._called = True, True
                yield call

    def _say(self, length: int) -> Iterator[str]:
        """Yield the first characters of the held text, unless blanks are all that was said."""
        text, self._held = self._blanks + self._held[:length], self._held[length:]
        self._silent = self._silent and not text.strip()
        self._blanks = text if self._silent else ""
        if text and not self._silent:
            yield text


def _length_of_open_tag(text: str) -> int:
    """Return the length of the longest end of a text that may become the beginning of a call."""
    lengths = range(len(BEGIN) - 1, 0, -1)
    return next((length for length in lengths if text.endswith(BEGIN[:length])), 0)


def _end_of_call(text: str) -> int | None:
    """Return where the call ends with which a text begins; None if it goes on."""
    found = _STRING_OR_END.finditer(text)
    return next((match.end() for match in found if match[0] == END), None)


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
