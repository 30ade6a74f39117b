"""Texts to fit on: from a file, answers to prompts, or written by the draft alone."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.decode.loop import decode
from easyspec_jax.decode.programs import Programs
from easyspec_jax.engine.completion import Generation
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar, no_bar
from easyspec_jax.tokenizer import encode
from easyspec_jax.tokenizer.conversation import Conversation, Tokenizer, from_template

LENGTH = 240
"""Tokens of a text."""

FEWEST = 3
"""Least number of texts: some to fit on, some to choose borders by, some to compare drafts on."""

ROWS = 32
"""Texts that are written together."""

_QUESTION = "{question}"


def read_texts(path: Path, tokenizer: Tokenizer, count: int) -> Int[np.ndarray, "texts tokens"]:
    """Cut a file into texts.

    Args:
        path: The file, in UTF-8.
        tokenizer: The draft's.
        count: Most texts to return.

    Returns:
        Token ids, int32 [texts, LENGTH].

    Raises:
        EasySpecError: The file cannot be read, or holds fewer than FEWEST texts.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"`text` {path} cannot be read: {error}") from None
    ids = encode(tokenizer, content) if content else []
    if len(ids) < FEWEST * LENGTH:
        raise EasySpecError(
            f"`text` {path} holds {len(ids)} tokens; give at least {FEWEST * LENGTH}"
        )
    return _cut(ids, count)


def check_answers(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> None:
    """Check that answer_prompts() has the memory it needs.

    Args:
        engine: The draft or its target, opened by itself.
        prompts: Token ids of each prompt, at least one.
        sampling: As for answer_prompts().

    Raises:
        EasySpecError: Memory will not suffice.
    """
    longest, rows = max(map(len, prompts)), min(ROWS, len(prompts))
    engine.check_memory(longest + LENGTH, longest, rows, replace(sampling, max_new_tokens=LENGTH))


def answer_prompts(
    engine: Engine,
    prompts: Sequence[str],
    count: int,
    sampling: SamplingParams,
    chat: bool,
    vocabulary: int,
    bar: Bar = no_bar,
) -> Int[np.ndarray, "texts tokens"]:
    """Join prompts and the engine's answers to them, and cut that into texts.

    Above temperature 0 all prompts are answered again, with other noise, until that is enough.

    Args:
        engine: The draft or its target, opened by itself.
        prompts: At least one.
        count: Most texts to return.
        sampling: Temperature and seed.
        chat: Wrap each prompt in the chat template.
        vocabulary: Number of ids that the draft knows; a target's further ones are left out.
        bar: Shows progress.

    Returns:
        Token ids, int32 [texts, LENGTH].

    Raises:
        EasySpecError: A prompt is unfit, before anything is generated; or prompts and answers come
            to fewer than FEWEST texts. Memory is not checked, see check_answers().
    """
    sampling, rows = replace(sampling, max_new_tokens=LENGTH), min(ROWS, len(prompts))
    engine.load(bar)
    ids: list[int] = []
    with bar("Answering", count) as advance:
        for answer in _answers(engine, prompts, sampling, chat, rows):
            before = len(ids) // LENGTH
            ids += [token for token in answer if token < vocabulary]
            advance(min(count, len(ids) // LENGTH) - before)
            if len(ids) >= count * LENGTH:
                break
    if len(ids) < FEWEST * LENGTH:
        raise EasySpecError(
            f"prompts and greedy answers have {len(ids)} tokens, fewer than {FEWEST * LENGTH}; "
            "give more prompts, or a `temperature` above 0"
        )
    return _cut(ids, count)


def _answers(
    engine: Engine, prompts: Sequence[str], sampling: SamplingParams, chat: bool, rows: int
) -> Iterator[list[int]]:
    """Yield the ids of each prompt and its answer, in order, round after round without end.

    Greedy answers would repeat themselves, so they come once.
    """
    # Answers by number that wait for one before them.
    early: dict[int, list[int]] = {}
    following = 0
    asked = _questions(engine, prompts, sampling, chat)
    for number, completion in engine.complete_each(asked, rows):
        # Short answers finish first. They wait here, so that texts do not depend on `rows`.
        early[number] = completion.prompt_ids + completion.token_ids
        while following in early:
            yield early.pop(following)
            following += 1


def _questions(
    engine: Engine, prompts: Sequence[str], sampling: SamplingParams, chat: bool
) -> Iterator[Generation]:
    """Prepare all prompts again and again, each time with the next seeds."""
    for turn in itertools.count() if sampling.temperature else range(1):
        for number, prompt in enumerate(prompts):
            seed = wrap_seed(sampling.seed + turn * len(prompts) + number)
            yield engine.row(prompt, replace(sampling, seed=seed), chat=chat)


def _cut(ids: Sequence[int], count: int) -> Int[np.ndarray, "texts tokens"]:
    """Cut ids into up to `count` texts and drop the rest."""
    found = min(count, len(ids) // LENGTH)
    # [found * LENGTH] -> [found, LENGTH]
    return np.asarray(ids[: found * LENGTH], np.int32).reshape(found, LENGTH)


def write_texts(
    programs: Programs,
    tokenizer: Tokenizer,
    count: int,
    sampling: SamplingParams,
    bar: Bar = no_bar,
) -> Int[np.ndarray, "texts tokens"]:
    """Let a model write texts: conversations if it has a chat template, else anything.

    Args:
        programs: Programs whose target is the model, compiled to stop at no token.
        tokenizer: The model's.
        count: Number of texts.
        sampling: Temperature and seed; text i draws its noise from seed + i.
        bar: Shows progress.

    Returns:
        Token ids, int32 [count, LENGTH].

    Raises:
        EasySpecError: The chat template writes more before a question than half of a text.
    """
    start = opening(tokenizer)
    if len(start) > LENGTH // 2:
        raise EasySpecError(
            f"the chat template begins with {len(start)} tokens, which leaves too little of a text "
            f"of {LENGTH}; give `text` or `prompts`"
        )
    texts = []
    with bar("Writing texts", count) as advance:
        for first in range(0, count, ROWS):
            rows = min(ROWS, count - first)
            chosen = replace(sampling, seed=wrap_seed(sampling.seed + first))
            written = [list(start) for _ in range(rows)]
            # Row i of a report holds num_tokens[i] new ids; what follows them is padding.
            for report in decode(programs, written, [LENGTH - len(start)] * rows, chosen):
                for row, text in enumerate(written):
                    text.extend(report.tokens[row, : report.num_tokens[row]])
            texts += written
            advance(rows)
    return np.asarray(texts, np.int32)


def opening(tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which a model writes by itself.

    With a chat template they are the start of a user's turn, so the model invents the question too.
    Without one they are the id that begins a text.
    """
    if tokenizer.chat_template:
        question = Conversation([{"role": "user", "content": _QUESTION}])
        before, found, _ = from_template(tokenizer, question).partition(_QUESTION)
        if found:
            return tokenizer(before, add_special_tokens=False).input_ids
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return [next(i for i in candidates if i is not None)]
