"""Results are files of JSON, written whole or not at all, and pictures of them."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyspec_jax import EasySpecError
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.drawing import check_drawing
from easyspec_jax.files import check_writable, write_whole

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Draw = Callable[[dict[str, Any]], bytes]
"""From what publish() writes to a picture of it, as PNG."""


def run_experiment(
    program: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """As run_command; the results tell what was typed, as args.command."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser.set_defaults(command=command_line(program, words))
    return run_command(program, parser, run, argv)


def command_line(program: str, words: Sequence[str]) -> str:
    """What somebody else would type: without --out, and with the mere names of absolute paths."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(Path(word).name if Path(word).is_absolute() else word)
        skip = word == "--out"
    return shlex.join(["python", "-m", program, *kept])


def prepare(out: Path) -> None:
    """Raises EasySpecError, before anything is measured, where publish() would not succeed."""
    check_destination(out)
    check_drawing()


def publish(
    out: Path, fields: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], draw: Draw
) -> None:
    """Writes the fields, the machine and the rows as JSON, and beside it the picture of all that."""
    measured = dict(fields) | {"machine": machine(fields.get("platform")), "results": list(rows)}
    save(out, as_json(measured))
    write_whole(out.with_suffix(".png"), draw(measured))


def settings(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The flags as they go into a file of results: paths by their names, without --out."""
    values = {name: value for name, value in vars(args).items() if name not in ("out", *left_out)}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else value


def machine(platform: str | None = None) -> dict[str, Any]:
    """What the figures were measured on; cores: of the host, as many as this process may use."""
    import jax

    devices = jax.devices(platform)
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "cores": cores(),
        "jax": jax.__version__,
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pair_title(measured: Mapping[str, Any]) -> str:
    """Whose results these are."""
    return (
        "the bundled pair"
        if measured.get("bundled")
        else f"{measured['target']}, drafted by {measured['draft']}"
    )


def draft_title(measured: Mapping[str, Any]) -> str:
    """Whose draft these results are of."""
    return "the bundled draft" if measured.get("bundled") else str(measured["draft"])


def as_json(measured: Mapping[str, Any]) -> str:
    """One line for every field and every row of the results."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(value)}"
        for name, value in measured.items()
        if name != "results"
    ]
    results = ",\n".join(f"  {json.dumps(row)}" for row in measured["results"])
    return "{\n " + ",\n ".join([*lines, f'"results": [\n{results}\n ]']) + "\n}\n"


def show(table: "Table") -> None:
    """Prints a table, as wide as it needs where nobody's terminal limits it."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)


def check_destination(path: Path) -> None:
    """Raises EasySpecError, before anything is measured, where save() could not write."""
    if not path.parent.is_dir() or path.suffix != ".json" or path.is_dir():
        raise EasySpecError(f"--out {path} is no .json file in a directory that exists")
    check_writable(path)  # an OSError says what is wrong


def save(path: Path, text: str) -> None:
    """Replaces the file, if there is one, once all of the text is on disk."""
    write_whole(path, text.encode())


def draw_again(program: str, doc: str | None, draw: Draw, argv: Sequence[str] | None) -> int:
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
