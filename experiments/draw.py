"""Draw a file of results again: `python -m experiments.draw JSON [--out PNG]`.

The script that measured it, by the command in the file or else by the file's name, has the picture.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.files import write_whole
from experiments.lib.output import read_results
from experiments.registry import Script, known, named


def script_of(path: Path, measured: Mapping[str, Any]) -> Script:
    """Find the script whose results a file holds.

    Raises:
        EasySpecError: There is none, or it draws no picture.
    """
    command = re.match(r"python -m experiments\.(\w+)", str(measured.get("command")))
    found = known(path.stem)
    script = named(command[1]) if command else found[0] if found else None
    if script is None or not script.draws:
        raise EasySpecError(f"{path}: no script draws such results; see experiments/README.md")
    return script


def run(args: argparse.Namespace) -> None:
    """Draw the picture and write it."""
    measured = read_results(args.measured)
    draw = script_of(args.measured, measured).function("draw")
    try:
        picture = draw(measured)
    except KeyError as missing:
        raise EasySpecError(f"{args.measured} has no {missing}") from None
    write_whole(args.out or args.measured.with_suffix(".png"), picture)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.draw", description=__doc__)
    parser.add_argument("measured", type=Path, metavar="JSON", help="what was measured")
    parser.add_argument("--out", type=Path, help="default: the same name, as .png")
    return run_command("experiments.draw", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
