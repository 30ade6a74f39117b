"""Parsing, exit codes and caching: everything that all commands do alike."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import cache_directory, read_input

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
"""Exit codes. A command may return others of its own, as a job with bad lines returns 1."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises EasySpecError where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise EasySpecError(f"{message} (see --help)")


def run_command(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
    interrupted: str = "",
) -> int:
    """Run a command on its arguments and turn what it raises into one line and an exit code.

    Args:
        program: The name that begins an error's line.
        parser: Reads the arguments.
        run: The command. It may return an exit code; None stands for OK.
        argv: The arguments, by default this process's.
        interrupted: What to say after Ctrl-C.

    Returns:
        The command's own exit code, BAD_INPUT after an error, INTERRUPTED after Ctrl-C.
    """
    try:
        return run(parser.parse_args(argv)) or OK
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}" if interrupted else "", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as `| head` does once it has its lines
        _abandon_stdout()
        return OK
    except EasySpecError as error:
        message = with_flags(str(error), flags_of(parser))
    except OSError as error:
        # stdout itself may be what failed: then what is left in its buffer has nowhere to go.
        try:
            sys.stdout.flush()
        except OSError:
            _abandon_stdout()
        message = str(error)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "use more devices, a smaller `dtype`, or lower `max_new_tokens`"
        message = with_flags(f"the devices' memory does not suffice; {advice}", flags_of(parser))
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _abandon_stdout() -> None:
    """Point stdout at nothing, because the interpreter flushes it at exit and would fail again."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_flags(message: str, flags: Collection[str]) -> str:
    """Name flags where a message of the library names fields.

    Args:
        message: A message with fields in backticks.
        flags: Flags of the command. Whatever else is in backticks stays.

    Examples:
        >>> with_flags("`top_p` 1.5 must be a probability; see `README`", ["--top-p"])
        '--top-p 1.5 must be a probability; see `README`'
    """

    def flag(field: re.Match[str]) -> str:
        name = "--" + field[1].replace("_", "-")
        return name if name in flags else field[0]

    return re.sub(r"`([a-z_]+)`", flag, message)


def flags_of(parser: argparse.ArgumentParser) -> frozenset[str]:
    """Return all flags of a parser."""
    return frozenset(parser._option_string_actions)


def flags_in(argv: Sequence[str] | None) -> set[str]:
    """Return the long flags that a command line, by default this process's, spells out."""
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def read_prompts(path: str | Path) -> list[str]:
    """Read the lines of a file, or of standard input for "-", that are not blank.

    Raises:
        EasySpecError: The file cannot be read, or all its lines are blank.
    """
    try:
        lines = read_input(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EasySpecError(f"--prompt-file {path} cannot be read: {error}") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise EasySpecError(f"--prompt-file {path} holds no prompt")
    return prompts


def cache_compilations() -> None:
    """Keep compiled programs on disk for the next run, unless JAX has a cache already."""
    import jax

    # JAX compiles anew where another process has half written an entry; a user need not know.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning
    )
    directory = cache_directory()
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if configured is None and directory is not None:
        with suppress(OSError):
            cache = directory / "xla"
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
