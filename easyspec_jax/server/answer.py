"""Completions in the forms of OpenAI's answers, whole or in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from easyspec_jax.engine.completion import Completion, TokenLogprobs
from easyspec_jax.engine.serving import Progress
from easyspec_jax.server.logprobs import Contents, TextOffsets, of_chat, of_completion
from easyspec_jax.server.protocol import Asked
from easyspec_jax.tokenizer.tool_calls import ToolCall, ToolCallParser

EMPTY: Contents = MappingProxyType({})


@dataclass(frozen=True)
class Answer:
    """The forms of all answers to one request.

    Attributes:
        asked: The request.
        model: The model's name.
        id: The answer's.
        created: When it was made, in seconds since 1970.
        finds_calls: Whether calls of tools are found in the text.
        contents: Content of each token id, if the request asks for log-probabilities.
    """

    asked: Asked
    model: str
    id: str
    created: int
    finds_calls: bool
    contents: Contents

    @classmethod
    def to(
        cls, asked: Asked, model: str, finds_calls: bool = False, contents: Contents = EMPTY
    ) -> "Answer":
        """Return the answer to a request, with an id of its own.

        Args:
            asked: The request.
            model: The model's name.
            finds_calls: Whether it writes calls of tools in a form that can be found.
            contents: Content of each token id, if the request asks for log-probabilities.
        """
        prefix = "chatcmpl-" if asked.chat else "cmpl-"
        identity, now = prefix + secrets.token_hex(16), int(time.time())
        return cls(asked, model, identity, now, asked.tools and finds_calls, contents)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        choices = [self._choice(index, one) for index, one in enumerate(completions)]
        answer = self.head("chat.completion") | {
            "choices": choices,
            "usage": usage(completions, self.asked.n),
        }
        if self.asked.trace:
            answer["easyspec"] = {"stats": [one.stats.as_dict() for one in completions]}
        return answer

    def counted(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        head = self.head("chat.completion.chunk")
        return head | {"choices": [], "usage": usage(completions, self.asked.n)}

    def head(self, kind: str) -> dict[str, Any]:
        """Return what every part of the answer begins with.

        Args:
            kind: What the part is called if the request is a chat.
        """
        return {
            "id": self.id,
            "object": kind if self.asked.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        text: dict[str, Any] = {"text": completion.text}
        reason = completion.finish_reason
        if self.asked.chat:
            said = Said(self)
            message = said.add(completion.text, last=True)
            # As in OpenAI's API, a message that only calls tools has no content.
            message = {"content": None if message.get("tool_calls") else "", **message}
            text = {"message": {"role": "assistant"} | message}
            reason = said.reason(completion)
        logprobs = self.logprobs(completion.logprobs, TextOffsets())
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(
        self, listed: Sequence[TokenLogprobs] | None, offsets: TextOffsets
    ) -> dict[str, Any] | None:
        """Return the `logprobs` of a choice or of a chunk; None if there are none.

        Args:
            listed: Those of its tokens.
            offsets: Has counted the tokens before.
        """
        if not listed:
            return None
        if self.asked.chat:
            return of_chat(listed, self.contents)
        return of_completion(listed, self.contents, offsets)


class Said:
    """Tells content from calls of tools in one answer of a chat.

    Attributes:
        calls: How many calls there were so far.
    """

    def __init__(self, answer: Answer) -> None:
        self.calls = 0
        self._parser = ToolCallParser() if answer.finds_calls else None
        self._several = answer.asked.parallel_tool_calls

    def add(self, text: str, last: bool = False) -> dict[str, Any]:
        """Take further text and return what of a message it adds: content, calls, or nothing.

        Args:
            text: The text.
            last: Whether no more comes.
        """
        if self._parser is None:
            return {"content": text} if text else {}
        parts = self._parser.feed(text) + (self._parser.end() if last else [])
        content = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, ToolCall)]
        if not self._several:
            calls = calls[: 1 - self.calls]
        self.calls += len(calls)
        message: dict[str, Any] = {"content": content} if content else {}
        return message | ({"tool_calls": [_tool_call(call) for call in calls]} if calls else {})

    def reason(self, completion: Completion) -> str:
        """Return why the answer ended."""
        called = self.calls and completion.finish_reason == "stop"
        return "tool_calls" if called else completion.finish_reason


class Streamed:
    """One of a request's answers in chunks, as it grows."""

    def __init__(self, answer: Answer, index: int) -> None:
        """Begin an answer.

        Args:
            answer: The forms of all answers to the request.
            index: Which of them it is.
        """
        self._answer, self._index = answer, index
        self._chat, self._trace = answer.asked.chat, answer.asked.trace
        self._said = Said(answer)
        self._offsets = TextOffsets()

    def first(self) -> list[dict[str, Any]]:
        """Return the chunk that begins an answer of a chat."""
        if not self._chat:
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def grown(self, progress: Progress) -> list[dict[str, Any]]:
        """Return the chunk of a round, if there is something to say."""
        gain = progress.gain
        part = self._part("".join(gain.pieces))
        logprobs = self._answer.logprobs(progress.logprobs, self._offsets)
        if part is None and logprobs is None and not self._trace:
            return []
        part = part or ({"delta": {"content": ""}} if self._chat else {"text": ""})
        chunk = self._chunk(part, logprobs=logprobs)
        if self._trace:
            chunk["easyspec"] = gain._asdict()
        return [chunk]

    def last(self, completion: Completion, rest: str) -> list[dict[str, Any]]:
        """Return the chunks that end an answer.

        Args:
            completion: The answer.
            rest: The end of its text that was in no round.
        """
        part = self._part(rest, last=True)
        end = {"delta": {}} if self._chat else {"text": ""}
        chunk = self._chunk(end, self._said.reason(completion))
        if self._trace:
            chunk["easyspec"] = {"stats": completion.stats.as_dict()}
        return [chunk] if part is None else [self._chunk(part), chunk]

    def _part(self, text: str, last: bool = False) -> dict[str, Any] | None:
        """Return what of a choice some text becomes; None for nothing."""
        if not self._chat:
            return {"text": text} if text else None
        before = self._said.calls
        delta = self._said.add(text, last)
        for index, call in enumerate(delta.get("tool_calls", ()), before):
            call["index"] = index
        return {"delta": delta} if delta else None

    def _chunk(
        self,
        part: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": self._index, **part, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._answer.head("chat.completion.chunk") | {"choices": [choice]}
        # As in OpenAI's API, every other chunk says that it has no usage.
        return chunk | {"usage": None} if self._answer.asked.include_usage else chunk


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def usage(completions: Sequence[Completion], n: int) -> dict[str, Any]:
    """Count tokens; a prompt that was answered n times counts once."""
    prompts = sum(len(one.prompt_ids) for one in completions[::n])
    cached = sum(one.stats.cached_tokens for one in completions[::n])
    completed = sum(len(one.token_ids) for one in completions)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completed,
        "total_tokens": prompts + completed,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
