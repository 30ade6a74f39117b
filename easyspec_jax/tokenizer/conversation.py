"""Conversations: check what a user sent, and render it with the checkpoint's chat template."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.tokenizer.stream import Tokenizer

Message = Mapping[str, Any]
"""One turn: its "role" ("system", "user", "assistant" or "tool") and its "content".

Further fields, such as "tool_calls", are passed on to the template.
"""

_RENDERING = 10.0  # seconds that a chat template may take
_RENDERED = 16 << 20  # characters that it may add to those of the messages
_ANSWER = "easyspecanswer"


@dataclass(frozen=True)
class Conversation:
    """A conversation to answer.

    Attributes:
        messages: The turns so far.
        tools: JSON schemas, as in OpenAI's API, of functions that the template offers to the model.

    Examples:
        >>> Conversation([{"role": "user", "content": "Hi!"}]).tools
        ()
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


Prompt = str | Sequence[Message] | Conversation
"""Text to continue, or a conversation to answer."""


def conversation_of(prompt: Any) -> Conversation:
    """Check a conversation and normalise it to the form that chat templates expect.

    As in vLLM, a content given in parts becomes one text, null fields are dropped, and arguments of
    tool calls become objects.

    Args:
        prompt: A Conversation or its messages; its types are not trusted.

    Raises:
        EasySpecError: There are no messages, or one has no role or a content that is not text.

    Examples:
        >>> parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "JAX?"}]
        >>> conversation_of([{"role": "user", "content": parts, "name": None}]).messages
        [{'role': 'user', 'content': 'What is\\nJAX?'}]
    """
    conversation = prompt if isinstance(prompt, Conversation) else Conversation(prompt)
    messages = conversation.messages
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise EasySpecError(
            "a prompt must be text, or a list of messages that each have a role and a content"
        )
    tools = conversation.tools or ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise EasySpecError("tools must be a list of objects")
    return Conversation([_message(turn) for turn in messages], tuple(tools))


def with_system(prompt: Prompt, system: str) -> Conversation:
    """Put a system message in front of a prompt, unless it is a conversation that has one.

    Examples:
        >>> with_system("Hi!", "Be brief.").messages[0]
        {'role': 'system', 'content': 'Be brief.'}
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    conversation = messages if isinstance(messages, Conversation) else Conversation(messages)
    if any(turn.get("role") == "system" for turn in conversation.messages):
        return conversation
    return replace(
        conversation, messages=[{"role": "system", "content": system}, *conversation.messages]
    )


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise EasySpecError(
            "a prompt must be text, or a list of messages that each have a role and a content"
        )
    fields = {name: value for name, value in turn.items() if value is not None}
    calls = fields.get("tool_calls")
    if isinstance(calls, list) and calls:
        fields["tool_calls"] = [_tool_call(call) for call in calls]
    # An assistant's turn that calls tools may lack its content; every other turn needs one.
    content = _content(fields["content"]) if "content" in fields else "" if calls else None
    if not isinstance(fields.get("role"), str) or content is None:
        raise EasySpecError("every message of a conversation needs a role and a content, both text")
    check_text(fields["role"])
    # What a model has said may be empty, and so may a tool's result or a system message.
    if content or fields["role"] == "user":
        check_text(content)
    return fields | {"content": content}


def _content(content: Any) -> str | None:
    """Join a content's parts with line breaks; None if the content is not text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind, text = "text", part
        if isinstance(part, Mapping):
            kind, text = part.get("type"), part.get("text")
        if kind != "text" or not isinstance(text, str):
            raise EasySpecError(f"content parts must be text; one is of type {str(kind)[:40]!r}")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Any) -> Any:
    """Parse a tool call's arguments, which OpenAI's format gives as a string of JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    # Arguments that are not an object of JSON (a model wrote them) stay the string they are.
    with suppress(ValueError, RecursionError):
        arguments = json.loads(function["arguments"])
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def check_text(text: str) -> None:
    """Raise EasySpecError if a prompt is empty or not valid Unicode."""
    if not text:
        raise EasySpecError("the prompt is empty; give at least one character")
    # Python keeps bytes of an argument that are not UTF-8 as lone surrogates; JSON can hold them
    # too ("\ud800"). The tokenizers library accepts neither.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise EasySpecError("the prompt is not valid Unicode; save or type it as UTF-8") from None


def from_template(tokenizer: Tokenizer, conversation: Conversation) -> str:
    """Render a conversation up to where the assistant's answer begins.

    Args:
        tokenizer: The target's, with its chat template.
        conversation: What conversation_of() returned.

    Raises:
        EasySpecError: The tokenizer has no chat template, or it fails on this conversation.
    """
    if not tokenizer.chat_template:
        raise EasySpecError("this checkpoint has no chat template; give plain text, without `chat`")
    try:
        text = rendered(tokenizer, conversation, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and can raise anything
        raise EasySpecError(
            f"the checkpoint's chat template fails ({first_line(error)}); "
            "give plain text, without `chat`"
        ) from None
    check_text(text)
    return text


def end_of_turn_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Find the token that the chat template writes after an assistant's answer.

    Fine-tunes often keep the end-of-text token of their base model in the configuration but end
    turns with a token of their own, which only the template knows.

    Returns:
        That token's id; empty without a template, or if no added token follows the answer.
    """
    if not tokenizer.chat_template:
        return ()
    # Render an answer that no template contains, and look at what comes after it, for example
    # "...easyspecanswer<|im_end|>\n".
    asked = Conversation(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    )
    try:
        text = rendered(tokenizer, asked, add_generation_prompt=False)
        after = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
        ids = tokenizer(after, add_special_tokens=False, verbose=False).input_ids
    # A template may refuse this conversation. If it refuses a real one, the user will hear of it.
    except Exception:
        return ()
    added = tokenizer.added_tokens_decoder
    for number in ids:
        token = added.get(number)
        if token is not None and (token.special or token.content.strip()):
            return (number,)
        # Blanks may come before the token; ordinary text means that there is none.
        if tokenizer.decode([number]).strip():
            break
    return ()


def rendered(
    tokenizer: Tokenizer, conversation: Conversation, *, add_generation_prompt: bool
) -> str:
    """Run the chat template.

    Args:
        tokenizer: The target's.
        conversation: What to render.
        add_generation_prompt: Whether an answer begins at the end.

    Raises:
        TimeoutError: It takes too long.
        ValueError: It makes too much text.
        Exception: Whatever the template itself raises.
    """
    longest = _RENDERED + len(str(conversation))
    with _deadline(_RENDERING):
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
    """Raise TimeoutError in the block's Python code after some seconds of this thread's time."""
    # transformers runs a template in a sandbox that does not limit its loops. An alarm signal
    # works in the main thread only, and a thread cannot be killed. A trace function is called
    # before every line of Python, in any thread, and may raise. It cannot interrupt a single call
    # into C code, so the length of the result is checked as well. Time is the thread's own, so
    # that a busy machine does not fail a good template.
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
