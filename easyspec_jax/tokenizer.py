"""Tokenizers: opening one, checking that two agree, and turning a growing list of ids into growing text."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyspec_jax.errors import EasySpecError, first_line

Tokenizer = Any
"""A transformers tokenizer, whatever its class."""

Message = Mapping[str, str]
"""One turn of a conversation: its "role" ("system", "user", "assistant") and its "content"."""

Prompt = str | Sequence[Message]
"""Text to go on from, or a conversation to answer."""

LARGEST_FILE = 256 << 20
"""Bytes of any file of a tokenizer; those of large vocabularies have 40 MiB."""

_RENDERING = 10.0  # seconds that a chat template may take
_RENDERED = 16 << 20  # characters that it may make beside those of the messages


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, offline and without running its code.

    Code that its configuration names (`auto_map`) is never imported. Raises EasySpecError if there is none, or one of
    its files is beyond all measure.
    """
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer*"):
        for path in filter(Path.is_file, directory.glob(pattern)):
            if path.stat().st_size > LARGEST_FILE:
                raise EasySpecError(f"{path} is larger than the {LARGEST_FILE >> 20} MiB of any proper one")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library raises for a broken or absent tokenizer
        raise EasySpecError(f"{directory} has no usable tokenizer: {first_line(error)}") from None


def check_same_ids(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises EasySpecError unless every token that both tokenizers know has one id, and every id one token.

    Special tokens may differ in name, as between Llama 3 and 3.1: the target verifies them like any other.
    """
    of_target, of_draft = target.get_vocab(), draft.get_vocab()
    by_id = {number: token for token, number in of_target.items()}
    special = _special_ids(target), _special_ids(draft)
    for token, number in of_draft.items():
        other = of_target.get(token, number)
        if other != number and not (other in special[0] and number in special[1]):
            raise EasySpecError(
                f"target and draft give {token!r} different token ids ({other} and {number}); "
                "choose a draft of the target's family"
            )
        if by_id.get(number, token) != token and not (number in special[0] and number in special[1]):
            raise EasySpecError(
                f"target and draft give token id {number} to different tokens ({by_id[number]!r} and {token!r}); "
                "choose a draft of the target's family"
            )


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode(tokenizer: Tokenizer, prompt: Prompt, chat: bool = False) -> list[int]:
    """A prompt's ids: a conversation through the chat template, text with the tokenizer's own special tokens.

    chat: text is a conversation of one user message. Raises EasySpecError for an empty prompt, invalid Unicode or a
    tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        _check_text(prompt)
        if not chat:
            return _ids(tokenizer, prompt, special=True)
        prompt = [{"role": "user", "content": prompt}]
    _check_messages(prompt)
    return _ids(tokenizer, from_template(tokenizer, prompt), special=False)


def _check_messages(messages: Any) -> None:
    turns = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, bytes) else []
    if not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise EasySpecError("a prompt is text, or a list of messages with a role and a content")
    for turn in turns:
        texts = turn.get("role"), turn.get("content")
        if not all(isinstance(text, str) for text in texts):
            raise EasySpecError("every message of a conversation needs a role and a content, both text")
        for text in texts:
            _check_text(text)


def _check_text(text: str) -> None:
    if not text:
        raise EasySpecError("the prompt is empty; give at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise EasySpecError("the prompt is no valid Unicode; save or type it as UTF-8") from None


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if not ids:
        raise EasySpecError(f"the prompt {text[:40]!r} has no tokens")
    return list(ids)


def from_template(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """A conversation as its text, up to where the assistant answers. Raises EasySpecError if there is no template."""
    if not tokenizer.chat_template:
        raise EasySpecError("this checkpoint has no chat template; leave out --chat")
    longest = _RENDERED + sum(len(text) for message in messages for text in message.values())
    try:
        with _deadline(_RENDERING):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        if len(text) > longest:
            raise ValueError(f"it makes {len(text)} characters")
        return text
    except Exception as error:  # a template is a program, and fails like one
        raise EasySpecError(f"the checkpoint's chat template fails ({first_line(error)}); leave out --chat") from None


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Python code within raises TimeoutError after so many seconds of its own; a call into C is not cut short."""
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


class TextStream:
    """Text that grows with its ids, never shows half a character, and ends before the stop string completed first.

    ids: the ids taken so far; those after the one that completed a stop string are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stop, self._text = tokenizer, stop, ""
        # Ids from _context to _read give the decoder what it needs to spell the ids after them.
        self._context = self._read = self._shown = 0

    @property
    def text(self) -> str:
        """What the ids say, certain or not."""
        return self._text + self._spelled(len(self.ids))

    def push(self, ids: Sequence[int]) -> str:
        """The text that these further ids add, as far as it is certain."""
        self.ids.extend(ids)
        added = self._spelled(len(self.ids))
        text = self._text + added.rstrip("\ufffd")
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop, self._shown)) >= 0]
        if found:
            self.stopped = True
            self._drop_ids_after_stop()
            _, place = min(found)  # the stop string that ends first, however many ids come at once
            text = text[:place]
        elif added.endswith("\ufffd"):
            return ""
        self._text, self._context, self._read = text, self._read, len(self.ids)
        shown, self._shown = self._shown, len(text) - (0 if self.stopped else self._withheld())
        return text[shown : self._shown]

    def rest(self) -> str:
        """What push() still holds back, when no more ids come."""
        return self.text[self._shown :]

    def _spelled(self, end: int) -> str:
        """The text of ids[_read:end]."""
        known = decode_text(self._tokenizer, self.ids[self._context : self._read])
        return decode_text(self._tokenizer, self.ids[self._context : end])[len(known) :]

    def _drop_ids_after_stop(self) -> None:
        for end in range(self._read + 1, len(self.ids)):
            text = self._text + self._spelled(end)
            if any(stop in text[self._shown :] for stop in self._stop):
                del self.ids[end:]
                return

    def _withheld(self) -> int:
        """Length of the longest end of the text that may yet become a stop string."""
        starts = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        return max((len(start) for start in starts if self._text.endswith(start)), default=0)


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
