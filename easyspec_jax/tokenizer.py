"""Tokenizers: opening one, checking that two agree, and turning a growing list of ids into growing text."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyspec_jax.errors import EasySpecError, first_line

Tokenizer = Any
"""A transformers tokenizer, whatever its class."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, offline and without running its code.

    Raises EasySpecError if there is none.
    """
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


def encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    """A prompt's ids: as one user message of the chat template, or plain with the tokenizer's own special tokens.

    Raises EasySpecError for an empty prompt or a tokenizer without a chat template.
    """
    if not prompt:
        raise EasySpecError("the prompt is empty; give at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise EasySpecError("the prompt is no valid Unicode; save or type it as UTF-8") from None
    if chat:
        prompt = _from_template(tokenizer, prompt)
    ids = tokenizer(prompt, add_special_tokens=not chat, verbose=False).input_ids
    if not ids:
        raise EasySpecError(f"the prompt {prompt!r} has no tokens")
    return list(ids)


def _from_template(tokenizer: Tokenizer, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise EasySpecError("this checkpoint has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and fails like one
        raise EasySpecError(f"the checkpoint's chat template fails ({first_line(error)}); leave out --chat") from None


class TextStream:
    """Text that grows with its ids and never shows half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these further ids add, as far as it is certain."""
        self._ids.extend(ids)
        text = decode_text(self._tokenizer, self._ids)
        if text.endswith("\ufffd"):
            return ""
        added, self._shown = text[self._shown :], len(text)
        return added

    def rest(self) -> str:
        """What push() still held back when no more ids come."""
        return decode_text(self._tokenizer, self._ids)[self._shown :]


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
