"""A conversation in the terminal: `python -m easyspec_jax.generate --chat` without a prompt."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from easyspec_jax.cli.console import print_note, print_summary
from easyspec_jax.engine.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar
from easyspec_jax.tokenizer.conversation import Message

HELP = "/clear forgets the conversation, /exit, /quit or Ctrl-D ends it, Ctrl-C cuts an answer short, /help says this"


GREETING: list[Message] = [{"role": "user", "content": "Hello"}]
"""What a model is loaded and compiled for before anybody has said anything."""


def converse(
    engine: Engine,
    sampling: SamplingParams,
    bar: Bar,
    read: Callable[[str], str] = input,
    system: str | None = None,
) -> None:
    """Answer line after line, each time with all that was said before, until "/exit", "/quit" or EOFError.

    Turn i draws its noise from seed + i. Ctrl-C cuts an answer short, which is then remembered as far as it came.

    Args:
        engine: The model.
        sampling: How answers are sampled.
        bar: Shows what takes long.
        read: Returns the next line that the user types, given a prompt for it.
        system: The system message that the conversation begins with.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can then be edited and called back)
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
    """The conversation with its answer, or without its last message if that gets none."""
    earlier = sum(message["role"] == "user" for message in messages) - 1
    turn = replace(sampling, seed=(sampling.seed + earlier) % 2**32)
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    try:
        engine.compile([messages], turn, bar=bar)
        completion = next(engine.generate([messages], turn, on_text=show))
        print(flush=True)
        if completion.error is not None:
            raise EasySpecError(completion.error)
        print_summary([completion], engine)
    except KeyboardInterrupt:
        print(flush=True)
    except EasySpecError as error:
        print_note(f"{error}, or /clear")
        return messages[:-1]
    # Sentencepiece begins an answer with a blank, which templates put there themselves.
    answer = "".join(pieces).removeprefix(" ")
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]
