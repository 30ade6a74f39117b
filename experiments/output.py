"""Results are files of JSON, written whole or not at all, and pictures of them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from easyspec_jax import EasySpecError
from easyspec_jax.command import Parser, run_command
from easyspec_jax.config import read_json
from easyspec_jax.files import check_writable, write_whole


def check_destination(path: Path) -> None:
    """Raises EasySpecError, before anything is measured, where save() could not write."""
    if not path.parent.is_dir() or path.suffix != ".json" or path.is_dir():
        raise EasySpecError(f"--out {path} is no .json file in a directory that exists")
    check_writable(path)  # an OSError says what is wrong


def save(path: Path, text: str) -> None:
    """Replaces the file, if there is one, once all of the text is on disk."""
    write_whole(path, text.encode())


def draw_again(
    program: str, doc: str | None, draw: Callable[[dict[str, Any]], bytes], argv: Sequence[str] | None
) -> int:
    """The command that draws results once more; returns its exit code."""
    parser = Parser(prog=f"python -m {program}", description=doc)
    parser.add_argument("measured", type=Path, metavar="JSON", help="what was measured")
    parser.add_argument("--out", type=Path, help="default: the same name, as .png")

    def run(args: argparse.Namespace) -> None:
        try:
            picture = draw(read_json(args.measured))
        except KeyError as missing:
            raise EasySpecError(f"{args.measured} holds no {missing}") from None
        write_whole(args.out or args.measured.with_suffix(".png"), picture)

    return run_command(program, parser, run, argv)
