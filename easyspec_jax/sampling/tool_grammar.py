"""Grammars of texts that call tools, in the form that Hermes and Qwen write.

<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easyspec_jax.tokenizer.tool_calls import BEGIN, END


@dataclass(frozen=True)
class ToolGrammar:
    """The calls that a text may have.

    Attributes:
        arguments: JSON schema of the arguments of each tool by name, all of them of objects.
        needs_call: Whether the text consists of calls. Otherwise it may say anything, before calls,
            between them and without any.
        several: Whether there may be more than one call.
    """

    arguments: Mapping[str, Mapping[str, Any]]
    needs_call: bool
    several: bool

    @property
    def text(self) -> str:
        """The value of SamplingParams.tool_calls."""
        own = {"needs_call": self.needs_call, "several": self.several}
        return json.dumps(own | {"arguments": self.arguments}, ensure_ascii=False)

    @classmethod
    def read(cls, text: str) -> "ToolGrammar":
        """Return the grammar that a text stands for."""
        return cls(**json.loads(text))

    def lark(self, options: Mapping[str, Any], tags_are_tokens: bool) -> str:
        """Return it in llguidance's variant of Lark.

        Args:
            options: How JSON is written; llguidance's "x-guidance" of a schema.
            tags_are_tokens: Whether the vocabulary has a token for each tag. llguidance takes such
                tokens for special ones, which no text matches.
        """
        names = [f"tool_{number}" for number in range(len(self.arguments))]
        begin, end = (BEGIN, END) if tags_are_tokens else (quoted(BEGIN), quoted(END))
        rules = [
            f"start: {self._start(tags_are_tokens)}",
            f"call: {begin} rest",
            f'rest: "\\n" ({" | ".join(names)}) "\\n" {end}',
        ]
        for name, (tool, schema) in zip(names, self.arguments.items(), strict=True):
            head = quoted(f'{{"name": {json.dumps(tool, ensure_ascii=False)}, "arguments": ')
            rules.append(f'{name}: {head} arguments_{name} "}}"')
            rules.append(f"arguments_{name}: %json {json.dumps({'x-guidance': options, **schema})}")
        return "\n".join(rules + self._terminals(tags_are_tokens))

    def _start(self, tags_are_tokens: bool) -> str:
        many = "*" if self.several else "?"
        if self.needs_call:
            return 'call ("\\n" call)*' if self.several else "call"
        # Without a token, what is said before a call ends with its tag.
        return f"(SAID call){many} SAID" if tags_are_tokens else f"(before rest){many} SAID"

    def _terminals(self, tags_are_tokens: bool) -> list[str]:
        if self.needs_call:
            return []
        if tags_are_tokens:
            return [r"SAID: /(.|\n)*/"]
        return [
            rf"before[lazy]: /(.|\n)*{BEGIN}/",
            rf"SAID: /(.|\n)*/ & ~/(.|\n)*{BEGIN}(.|\n)*/",
        ]


def quoted(text: str) -> str:
    """Return a string as Lark writes it."""
    # llguidance takes no DEL within a string.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
