"""Conversations: checking what a user sent, and writing it out with the checkpoint's chat template."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from easyspec_jax.errors import EasySpecError, first_line

Tokenizer = Any
"""A transformers tokenizer that is backed by the tokenizers library."""

Message = Mapping[str, Any]
"""One turn: its "role" ("system", "user", "assistant", "tool") and "content"; templates see further fields too."""

_RENDERING = 10.0  # seconds that a chat template may take
_RENDERED = 16 << 20  # characters that it may add to those of the messages
_ANSWER = "easyspecanswer"


@dataclass(frozen=True)
class Conversation:
    """A conversation to answer, with the tools that the template may offer to the model (OpenAI's JSON schemas)."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


Prompt = str | Sequence[Message] | Conversation
"""Text to go on from, or a conversation to answer."""


def conversation_of(prompt: Any) -> Conversation:
    """Check a conversation and bring it into the form that chat templates expect.

    Content in parts becomes one text, fields that are null are dropped, and a tool call's arguments become an object,
    as in vLLM.

    Args:
        prompt: A Conversation or its messages, of any types.

    Raises:
        EasySpecError: It has no messages, or one without a role or with a content that is not text.
    """
    conversation = prompt if isinstance(prompt, Conversation) else Conversation(prompt)
    messages = conversation.messages
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise EasySpecError("a prompt is text, or a list of messages with a role and a content")
    tools = conversation.tools or ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise EasySpecError("tools must be a list of objects")
    return Conversation([_message(turn) for turn in messages], tuple(tools))


def with_system(prompt: Prompt, system: str) -> Conversation:
    """Put a system message in front of a prompt, unless it is a conversation that has one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    conversation = messages if isinstance(messages, Conversation) else Conversation(messages)
    if any(turn.get("role") == "system" for turn in conversation.messages):
        return conversation
    return replace(
        conversation, messages=[{"role": "system", "content": system}, *conversation.messages]
    )


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise EasySpecError("a prompt is text, or a list of messages with a role and a content")
    fields = {name: value for name, value in turn.items() if value is not None}
    calls = fields.get("tool_calls")
    if calls:
        fields["tool_calls"] = (
            [_tool_call(call) for call in calls] if isinstance(calls, list) else calls
        )
    content = _content(fields["content"]) if "content" in fields else "" if calls else None
    if not isinstance(fields.get("role"), str) or content is None:
        raise EasySpecError("every message of a conversation needs a role and a content, both text")
    check_text(fields["role"])
    if content or not calls:
        check_text(content)
    return fields | {"content": content}


def _content(content: Any) -> str | None:
    """The text of a message's content, its parts on lines of their own; None if it is something else."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind, text = (
            (part.get("type"), part.get("text")) if isinstance(part, Mapping) else ("text", part)
        )
        if kind != "text" or not isinstance(text, str):
            raise EasySpecError(f"content parts must be text; one is of type {str(kind)[:40]!r}")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates want them; OpenAI's format writes that as a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    with suppress(ValueError, RecursionError):
        arguments = json.loads(function["arguments"])
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def check_text(text: str) -> None:
    """Raise EasySpecError if a prompt is empty or not valid Unicode."""
    if not text:
        raise EasySpecError("the prompt is empty; give at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise EasySpecError("the prompt is no valid Unicode; save or type it as UTF-8") from None


def from_template(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """Write out a conversation up to where the assistant answers.

    Raises:
        EasySpecError: The tokenizer has no chat template, or the template fails on this conversation.
    """
    if not tokenizer.chat_template:
        raise EasySpecError("this checkpoint has no chat template; leave out --chat")
    try:
        text = _rendered(tokenizer, conversation, _RENDERING, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and fails like one
        raise EasySpecError(
            f"the checkpoint's chat template fails ({first_line(error)}); leave out --chat"
        ) from None
    check_text(text)
    return text


def end_of_turn_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Find the token that the chat template writes after an assistant's answer.

    Fine-tunes often keep the end-of-text of their base model in the configuration and end their turns with a token of
    their own, which only the template knows.

    Returns:
        That token's id, or nothing if there is no template or no added token comes next.
    """
    if not tokenizer.chat_template:
        return ()
    asked = Conversation(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    )
    try:
        text = _rendered(tokenizer, asked, _RENDERING, add_generation_prompt=False)
        after = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
        ids = tokenizer(after, add_special_tokens=False, verbose=False).input_ids
    except (
        Exception
    ):  # a template may refuse this conversation, and is heard when a real one is rendered
        return ()
    added = tokenizer.added_tokens_decoder
    for number in ids:
        token = added.get(number)
        if token is not None and (token.special or token.content.strip()):
            return (number,)
        if tokenizer.decode([number]).strip():
            break
    return ()


def _rendered(
    tokenizer: Tokenizer, conversation: Conversation, seconds: float, add_generation_prompt: bool
) -> str:
    """The template's text. Raises whatever it raises, TimeoutError after some seconds, ValueError if it is huge."""
    longest = _RENDERED + len(str(conversation))
    with _deadline(seconds):
        text = tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=list(conversation.tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    if len(text) > longest:
        raise ValueError(f"it makes {len(text)} characters")
    return text


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Python code within raises TimeoutError after these seconds of its own; a call into C is not cut short."""
    end, before = time.thread_time() + seconds, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"it takes longer than {seconds:g} s")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
