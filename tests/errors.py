"""Write docs/errors.md: every error message, and a test that reaches it.

`python -m tests.errors [pytest's arguments]` runs the tests and notes which of them makes each
message first. A message that a partial run does not reach keeps its test, as long as that exists.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec_jax.errors import EasySpecError

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "errors.md"
VARIABLE = "EASYSPEC_RECORD_ERRORS"
KINDS = ("EasySpecError", "ArgumentTypeError")
HEAD = """# Errors

Every message says what is wrong and, after a semicolon or in brackets, what to do. A command prints
it as one line on stderr and exits with 2. `{…}` stands for a value. A field in backticks that is a
flag of the command is printed as that flag: `top_p` as `--top-p`. Messages that are not listed
come from the parser (an unknown flag, or a value that it does not take), from the system, and, when
memory runs out after all, `the devices' memory does not suffice`. `python -m tests.errors` writes
the table: it runs the tests and notes the one that reaches each message.

| message | from | reached by |
|-|-|-|
"""


@dataclass(frozen=True)
class Site:
    """A place in the code that makes a message: a file, its lines and the message."""

    path: str
    first: int
    last: int
    message: str

    @property
    def key(self) -> tuple[str, str]:
        """What identifies it in the table; lines move."""
        return self.message, self.path


def sites() -> list[Site]:
    """Find all places in easyspec_jax and convert that make a message."""
    files = sorted(
        path for package in ("easyspec_jax", "convert") for path in (ROOT / package).rglob("*.py")
    )
    return [site for path in files for site in _sites_of(path)]


def _sites_of(path: Path) -> list[Site]:
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    name = path.relative_to(ROOT).as_posix()
    made = [
        call
        for call in calls
        if getattr(call.func, "id", getattr(call.func, "attr", None)) in KINDS
    ]
    return [
        Site(name, call.lineno, call.end_lineno or call.lineno, _text(call.args[0]))
        for call in made
    ]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.Constant):
        return str(node.value)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    return "{" + ast.unparse(value) + "}"


def row(site: Site, test: str) -> str:
    """Format a line of the table."""
    return f"| {_cell(site.message)} | `{site.path}` | `{test}` |"


def _cell(text: str) -> str:
    # A code span that holds backticks needs a longer fence, and blanks between the two.
    fence, gap = ("``", " ") if "`" in text else ("`", "")
    return f"{fence}{gap}{' '.join(text.split())}{gap}{fence}".replace("|", "\\|")


def documented() -> dict[str, str]:
    """Return the test of each message in the document, keyed by the table's first two cells."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.exists() else []
    cells = (line.removesuffix(" |").rpartition(" | ") for line in lines if line.startswith("| `"))
    return {head: test.strip("`") for head, _, test in cells}


def exists(test: str) -> bool:
    """Return whether a test, written as path::name, is still there."""
    path, _, name = test.partition("::")
    file = ROOT / path
    return bool(name) and file.is_file() and f"def {name}(" in file.read_text(encoding="utf-8")


def head_of(site: Site) -> str:
    """Return a message's first two cells in the table."""
    return row(site, "").rpartition(" | ")[0]


def record(directory: str) -> None:
    """Note from now on which test makes an error where, one line each, in a directory."""
    path = Path(directory) / str(os.getpid())

    def noting(plain: Any) -> Any:
        def init(self: Exception, *args: Any) -> None:
            plain(self, *args)
            frame = sys._getframe(1)
            test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].partition("[")[0]
            if test and frame.f_code.co_filename.startswith(str(ROOT)):
                place = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{place}\t{frame.f_lineno}\t{test}\n")

        return init

    for kind in (EasySpecError, argparse.ArgumentTypeError):
        kind.__init__ = noting(kind.__init__)


def main(arguments: list[str]) -> int:
    """Run the tests and write the document; return how many messages no test reaches."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "not exhaustive"]
        command += arguments
        subprocess.run(command, cwd=ROOT, env=os.environ | {VARIABLE: directory}, check=False)
        missing = write(Path(directory))
    for site in missing:
        print(f"{site.path}:{site.first}: reached by no test: {site.message}")
    return len(missing)


def write(records: Path) -> list[Site]:
    """Put what was recorded into the document; return the messages that no test reaches."""
    lines = sorted(
        {
            line
            for path in records.iterdir()
            for line in path.read_text(encoding="utf-8").splitlines()
        }
    )
    every, before, tests = sites(), documented(), dict[Site, str]()
    for path, number, test in (line.split("\t") for line in lines):
        for site in every:
            if site.path == path and site.first <= int(number) <= site.last:
                tests.setdefault(site, test)
    for site in every:
        if exists(kept := before.get(head_of(site), "")):
            tests[site] = kept
        tests.setdefault(site, "")
    rows = dict.fromkeys(
        row(site, test) for site, test in sorted(tests.items(), key=lambda item: item[0].key)
    )
    DOCUMENT.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return [site for site, test in tests.items() if not test]


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
