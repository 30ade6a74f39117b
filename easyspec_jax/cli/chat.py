"""A conversation in the terminal: `python -m easyspec_jax.generate --chat` without a prompt."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from easyspec_jax.arithmetic import wrap_seed
from easyspec_jax.cli.command import with_flags
from easyspec_jax.cli.console import print_note, print_summary
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar
from easyspec_jax.tokenizer.conversation import Message

HELP = (
    "/clear forgets the conversation, /exit, /quit or Ctrl-D ends it, Ctrl-C cuts an answer short, "
    "/help says this"
)


GREETING: list[Message] = [{"role": "user", "content": "Hello"}]
"""Conversation that a model is loaded and compiled for, before the user has typed anything."""


def converse(
    engine: Engine,
    sampling: SamplingParams,
    bar: Bar,
    read: Callable[[str], str] = input,
    system: str | None = None,
) -> None:
    """Answer line after line until "/exit", "/quit" or the end of input.

    The model sees the whole conversation each time. Turn i draws its noise from seed + i. After
    Ctrl-C the conversation goes on with as much of the answer as there is.

    Args:
        engine: The model.
        sampling: How answers are sampled.
        bar: Shows the progress of what takes long.
        read: Returns the next line that the user types; called with a prompt to show.
        system: A system message that the conversation begins with.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    people = sys.stdin.isatty() and sys.stdout.isatty()
    if people:
        print_note(HELP)
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = begin
    while True:
        try:
            text = read("\n> " if people else "").strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/help":
            print_note(HELP)
        elif text == "/clear":
            messages = begin
        elif text:
            messages = _answer(
                engine, [*messages, {"role": "user", "content": text}], sampling, bar
            )


def _answer(
    engine: Engine, messages: list[Message], sampling: SamplingParams, bar: Bar
) -> list[Message]:
    """Print an answer. Return the conversation with it, or without its question on failure."""
    earlier = sum(message["role"] == "user" for message in messages) - 1
    turn = replace(sampling, seed=wrap_seed(sampling.seed + earlier))
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    try:
        rows = engine.prepare([messages])
        engine.compile(rows, turn, bar=bar)
        completion = next(engine.generate(rows, turn, on_text=show, bar=bar))
        print(flush=True)
        if completion.error is not None:
            raise EasySpecError(completion.error)
        print_summary([completion], engine)
    except KeyboardInterrupt:
        print(flush=True)
    except EasySpecError as error:
        print_note(f"{with_flags(str(error), ['--max-length'])}, or /clear")
        return messages[:-1]
    # Sentencepiece decodes an answer with a leading blank, but a template writes its own.
    answer = "".join(pieces).removeprefix(" ")
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]
