"""Texts to fit on: a file's, the draft's answers to prompts, or all its own."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from easyspec_jax.decode.loop import decode
from easyspec_jax.decode.programs import Programs
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.tokenizer import encode
from easyspec_jax.tokenizer.conversation import Conversation, Tokenizer, from_template

LENGTH = 240
"""Tokens of a text."""

FEWEST = 3
"""Texts: some to fit on, some to choose by, some to say what was gained."""

ROWS = 32
"""Texts that are written together."""

_QUESTION = "{question}"


def read_texts(path: Path, tokenizer: Tokenizer, count: int) -> Int[np.ndarray, "texts tokens"]:
    """Up to `count` texts, one after another out of a file. Raises EasySpecError if it holds too little."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"--text {path} cannot be read: {error}") from None
    ids = encode(tokenizer, content) if content else []
    if len(ids) < FEWEST * LENGTH:
        raise EasySpecError(
            f"--text {path} holds {len(ids)} tokens; give at least {FEWEST * LENGTH}"
        )
    return _cut(ids, count)


def answer_prompts(
    engine: Engine,
    prompts: Sequence[str],
    count: int,
    sampling: SamplingParams,
    chat: bool,
    bar: Bar = no_bar,
) -> Int[np.ndarray, "texts tokens"]:
    """Up to `count` texts, one after another out of prompts with what the engine makes of them.

    Above temperature 0 all are answered again, with other noise, until that is enough. Raises EasySpecError for any bad
    prompt before anything is generated, and for too few prompts.
    """
    sampling = replace(sampling, max_new_tokens=LENGTH)
    rows = min(ROWS, len(prompts))
    longest = max(len(engine.encode(prompt, chat)) for prompt in prompts)
    engine.check_memory(longest + LENGTH, longest, rows, sampling)
    engine.load(bar)
    ids: list[int] = []
    with bar("Answering", count) as advance:
        for answer in _answers(engine, prompts, sampling, chat, rows):
            before = len(ids) // LENGTH
            ids += answer
            advance(min(count, len(ids) // LENGTH) - before)
            if len(ids) >= count * LENGTH:
                break
    if len(ids) < FEWEST * LENGTH:
        raise EasySpecError(
            f"prompts and greedy answers have {len(ids)} tokens, fewer than {FEWEST * LENGTH}; "
            "give more prompts, or a --temperature above 0"
        )
    return _cut(ids, count)


def _answers(
    engine: Engine, prompts: Sequence[str], sampling: SamplingParams, chat: bool, rows: int
) -> Iterator[list[int]]:
    """Prompts with their answers, in order; greedy ones would be the same again."""
    asked = (
        engine.row(
            prompt,
            replace(sampling, seed=(sampling.seed + turn * len(prompts) + number) % 2**32),
            chat=chat,
        )
        for turn in (itertools.count() if sampling.temperature else range(1))
        for number, prompt in enumerate(prompts)
    )
    early: dict[int, list[int]] = {}
    following = 0
    for number, completion in engine.complete_each(asked, rows):
        early[number] = completion.prompt_ids + completion.token_ids
        while following in early:
            yield early.pop(following)
            following += 1


def _cut(ids: Sequence[int], count: int) -> Int[np.ndarray, "texts tokens"]:
    found = min(count, len(ids) // LENGTH)
    return np.asarray(ids[: found * LENGTH], np.int32).reshape(found, LENGTH)


def write_texts(
    programs: Programs,
    tokenizer: Tokenizer,
    count: int,
    sampling: SamplingParams,
    bar: Bar = no_bar,
) -> Int[np.ndarray, "texts tokens"]:
    """Texts that the programs' target writes, conversations if it has a chat template.

    The programs must stop at no token. Text i draws its noise from sampling's seed + i.
    """
    start = opening(tokenizer)
    texts = []
    with bar("Writing texts", count) as advance:
        for first in range(0, count, ROWS):
            rows = min(ROWS, count - first)
            chosen = replace(sampling, seed=(sampling.seed + first) % 2**32)
            written = [list(start) for _ in range(rows)]
            for report in decode(programs, written, [LENGTH - len(start)] * rows, chosen):
                for row, text in enumerate(written):
                    text.extend(report.tokens[row, : report.num_tokens[row]])
            texts += written
            advance(rows)
    return np.asarray(texts, np.int32)


def opening(tokenizer: Tokenizer) -> list[int]:
    """The ids after which a text is the model's own: up to a user's question, or what begins texts."""
    if tokenizer.chat_template:
        question = Conversation([{"role": "user", "content": _QUESTION}])
        before, found, _ = from_template(tokenizer, question).partition(_QUESTION)
        if found:
            return tokenizer(before, add_special_tokens=False).input_ids
    first = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return [first]
