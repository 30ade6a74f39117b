"""Results: files of JSON, written whole or not at all, with a picture next to each."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyspec_jax import EasySpecError
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import run_command
from easyspec_jax.files import check_writable, write_whole
from easyspec_jax.progress import progress_lines
from easyspec_jax.tune.drawing import check_drawing
from experiments.lib.machine import machine

if TYPE_CHECKING:
    from rich.table import Column, Table

RESULTS = Path(__file__).parents[1] / "results"

UNRECORDED = ("out", "allow_links")
"""Flags that say nothing about what was measured."""

Draw = Callable[[dict[str, Any]], bytes]
"""Makes a picture, as PNG, of what publish() writes."""


def run_experiment(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None,
) -> int:
    """Run a command as run_command does, and print lines of progress without a terminal.

    The results record what was typed, as `args.command`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser.set_defaults(command=command_line(program, words))

    def logged(args: argparse.Namespace) -> int | None:
        with progress_lines():
            return run(args)

    return run_command(program, parser, logged, argv)


def command_line(program: str, words: Sequence[str]) -> str:
    """Return the command for other machines: without --out, absolute paths cut to their names."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            kept.append(flag + equals + (Path(value).name if Path(value).is_absolute() else value))
        skip = word == "--out"
    return shlex.join(["python", "-m", program, *kept])


def prepare(out: Path) -> None:
    """Check, before anything is measured, that publish() will succeed.

    Raises:
        EasySpecError: The file cannot be written, or matplotlib is missing.
    """
    check_destination(out)
    check_drawing()


def publish(
    out: Path, fields: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], draw: Draw
) -> None:
    """Write the fields, the machine and the rows as JSON, and the picture of them next to it."""
    measured = dict(fields) | {"machine": machine(fields.get("platform")), "results": list(rows)}
    save(out, as_json(measured))
    write_whole(out.with_suffix(".png"), draw(measured))


def settings(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """Return the flags as results record them: paths by their names, UNRECORDED ones left out."""
    recorded = {}
    for name, value in vars(args).items():
        if name not in (*UNRECORDED, *left_out):
            recorded[name] = value.name if isinstance(value, Path) else value
    return recorded


def read_results(path: Path) -> dict[str, Any]:
    """Read what an experiment has written.

    Raises:
        EasySpecError: The file cannot be read, or was not written by an experiment.
    """
    if not path.is_file():
        raise EasySpecError(f"{path} is missing; name a file that an experiment has written")
    measured = read_json(path)
    rows = measured.get("results")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EasySpecError(f"{path} is not a results file of an experiment")
    return measured


def measured_before(
    out: Path, fields: Mapping[str, Any], flag: str, may_differ: Collection[str]
) -> list[dict[str, Any]]:
    """Read the rows of an earlier run with the same settings, to put others beside them.

    Args:
        out: The file; it may be missing.
        fields: This run's settings, as publish() writes them.
        flag: The flag that asks for this.
        may_differ: Settings that may be others.

    Raises:
        EasySpecError: The file cannot be read, or its settings are others.
    """
    if not out.exists():
        return []
    before = read_results(out)
    for name, value in fields.items():
        if name not in may_differ and before.get(name) != value:
            raise EasySpecError(
                f"{flag}: {out} was measured with {name} {before.get(name)!r}, not {value!r}; "
                "give another --out"
            )
    return before["results"]


def as_json(measured: Mapping[str, Any]) -> str:
    """Write results as JSON, one line for every field and every row."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(value)}"
        for name, value in measured.items()
        if name != "results"
    ]
    results = ",\n".join(f"  {json.dumps(row)}" for row in measured["results"])
    return "{\n " + ",\n ".join([*lines, f'"results": [\n{results}\n ]']) + "\n}\n"


def align_right(columns: "Sequence[Column]") -> None:
    """Align the figures of some columns of a table."""
    for column in columns:
        column.justify = "right"


def show(table: "Table") -> None:
    """Print a table; where there is no terminal to fit, it may be 140 characters wide."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)


def check_destination(path: Path) -> None:
    """Check, before anything is measured, that save() can write a file.

    Raises:
        EasySpecError: The path is not a .json file in a directory that exists.
        OSError: The file is not writable.
    """
    if not path.parent.is_dir() or path.suffix != ".json" or path.is_dir():
        raise EasySpecError(f"--out {path} must be a .json file in a directory that exists")
    check_writable(path)


def save(path: Path, text: str) -> None:
    """Replace the file, if there is one, once all of the text is on disk."""
    write_whole(path, text.encode())
