"""A conversation in the terminal: `python -m easyspec_jax.generate --chat` without a prompt."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from easyspec_jax.engine import Engine
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SamplingParams
from easyspec_jax.progress import Bar
from easyspec_jax.terminal import print_note, print_summary
from easyspec_jax.tokenizer import Message

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C cuts an answer short"


GREETING: list[Message] = [{"role": "user", "content": "Hello"}]
"""What a model is loaded and compiled for before anybody has said anything."""


def converse(engine: Engine, sampling: SamplingParams, bar: Bar, read: Callable[[str], str] = input) -> None:
    """Answers what read() brings, each time with all that was said before, until it brings "/exit" or EOFError.

    Turn i draws its noise from seed + i. Ctrl-C cuts an answer short, which is then remembered as far as it came.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can then be edited and called back)
    people = sys.stdin.isatty() and sys.stdout.isatty()
    if people:
        print_note(HELP)
    messages: list[Message] = []
    while True:
        try:
            text = read("\n> " if people else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/clear":
            messages = []
        elif text:
            messages = _answer(engine, [*messages, {"role": "user", "content": text}], sampling, bar)


def _answer(engine: Engine, messages: list[Message], sampling: SamplingParams, bar: Bar) -> list[Message]:
    """The conversation with its answer, or without its last message if that gets none."""
    turn = replace(sampling, seed=(sampling.seed + len(messages) // 2) % 2**32)
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
    answer = "".join(pieces)
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]
