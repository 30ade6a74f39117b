"""Parsing, running and caching shared by all commands."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from easyspec_jax.errors import EasySpecError
from easyspec_jax.files import cache_directory, read_input


class Parser(argparse.ArgumentParser):
    """Refuses a bad command line as everything else is refused: with an EasySpecError, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise EasySpecError(f"{message} (see --help)")


def run_command(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Runs a command on its arguments; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        run(parser.parse_args(argv))
    except BrokenPipeError:  # the reader has had enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (EasySpecError, OSError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def flags_in(argv: Sequence[str] | None) -> set[str]:
    """The long flags that a command line, by default this process's, spells out."""
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def add_allow_links(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flag that lets a checkpoint's files lie elsewhere."""
    parser.add_argument("--allow-links", action="store_true",
                        help="follow links that lead out of a checkpoint's directory")  # fmt: skip


def read_prompts(path: str | Path) -> list[str]:
    """Read the lines of a file, or of standard input for "-", that are not blank.

    Raises:
        EasySpecError: It cannot be read, or there are none.
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
    """A second run of the same models and mesh starts at once, unless JAX is told of another cache."""
    import jax

    # Half-written entries are compiled again; there is nothing to warn about.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning
    )
    directory = cache_directory()
    if jax.config.jax_compilation_cache_dir is None and directory is not None:  # pyright: ignore[reportAttributeAccessIssue]
        with suppress(OSError):
            cache = directory / "xla"
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
