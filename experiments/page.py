"""Write what documents say of results: `python -m experiments.page [--check]`.

A generated passage is what stands between `<!-- generated: NAME -->` and `<!-- end -->`. NAME is
one of lib/passages/. A passage in lines of its own is indented like its marker; one within a line
is a single figure. --check writes nothing, and fails if a document is not what the results make.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.files import write_whole
from experiments.lib.output import RESULTS
from experiments.lib.passages import PASSAGES
from experiments.lib.sections import sections

ROOT = Path(__file__).parents[1]

DOCUMENTS = ("README.md", "docs/*.md", "experiments/README.md", "easyspec_jax/demo/README.md")
"""Where passages may be, from the root of the repository."""

INLINE = re.compile(r"(<!-- generated: (\w+) -->)[^\n]*?(<!-- end -->)")
BLOCK = re.compile(r"^( *)(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", re.M | re.S)


def generated(text: str, results: Path) -> str:
    """Return a document with all of its passages made anew.

    Raises:
        EasySpecError: A marker names no passage, or a result is missing.
    """

    def block(found: re.Match[str]) -> str:
        margin, begin, name, end = found.groups()
        return f"{margin}{begin}\n\n{indent(passage(name, results), margin)}\n\n{margin}{end}"

    def inline(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return f"{begin}{passage(name, results)}{end}"

    return INLINE.sub(inline, BLOCK.sub(block, text))


def passage(name: str, results: Path) -> str:
    """Write one passage."""
    if name not in PASSAGES:
        raise EasySpecError(f"unknown passage {name}: choose from {', '.join(PASSAGES)}")
    return PASSAGES[name](results)


def stale(root: Path, results: Path) -> dict[Path, str]:
    """Find the documents that are not what the results make, and what they should be."""
    found = {}
    for pattern in DOCUMENTS:
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            made = generated(text, results)
            if made != text:
                found[path] = made
    return found


def update(root: Path = ROOT, results: Path = RESULTS) -> list[Path]:
    """Bring all documents up to date and return those that changed."""
    changed = stale(root, results)
    for path, text in changed.items():
        write_whole(path, text.encode())
    return list(changed)


def write_page(results: Path) -> None:
    """Write the sections of other results than the committed ones, as README.md above them."""
    text = f"# Results\n\n{sections(results)}"
    write_whole(results.parent / "README.md", text.encode())


def run(args: argparse.Namespace) -> None:
    """Check or update what is asked for."""
    if args.check:
        old = [str(path.relative_to(ROOT)) for path in stale(ROOT, RESULTS)]
        if old:
            raise EasySpecError(
                f"{', '.join(old)} differs from the results; run python -m experiments.page"
            )
    elif args.results is None:
        for path in update():
            print(path.relative_to(ROOT))
    else:
        write_page(args.results)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.page", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="fail if a document is out of date")
    which.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="write the sections of these results to README.md in the directory above",
    )
    return run_command("experiments.page", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
