"""Measure everything anew and update the documents: `python -m experiments.run --quick`.

Each result is one command in a process of its own. Without --quick the scripts' defaults apply.
--smoke is small enough for continuous integration and leaves the results alone.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.files import check_writable
from experiments import page
from experiments.lib.output import RESULTS
from experiments.registry import SCRIPTS, Result, Script


@dataclass(frozen=True)
class Step:
    """One result to measure."""

    script: Script
    result: Result

    @property
    def name(self) -> str:
        """Return the name of the result."""
        return self.result.name


STEPS = tuple(
    Step(script, result)
    for script in SCRIPTS
    for result in script.results
    if result.quick is not None
)


def arguments(step: Step, results: Path, size: str) -> list[str]:
    """Return a step's command; size: "full", "quick" or "smoke"."""
    flags = {"full": "", "quick": step.result.quick or "", "smoke": step.result.smoke or ""}[size]
    command = [sys.executable, "-m", f"experiments.{step.script.name}", *flags.split()]
    return [*command, "--out", str(results / f"{step.name}.json")]


def chosen(only: Sequence[str] | None, smoke: bool) -> list[Step]:
    """Return the steps to take.

    Raises:
        EasySpecError: `only` names a step that does not exist.
    """
    names = [step.name for step in STEPS]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise EasySpecError(f"--only {unknown[0]}: choose from {', '.join(names)}")
    steps = [step for step in STEPS if not only or step.name in only]
    return [step for step in steps if not smoke or step.result.smoke is not None]


def take(steps: Sequence[Step], results: Path, size: str) -> None:
    """Take one step after the other, then write the page of results.

    Raises:
        EasySpecError: Steps have failed; the message names them.
    """
    failed = []
    for step in steps:
        begun = time.perf_counter()
        print(f"{step.name} …", flush=True)
        if subprocess.run(arguments(step, results, size), check=False).returncode:
            failed.append(step.name)
        print(f"{step.name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if results == RESULTS:
        page.update()
    else:
        page.write_page(results)
    if failed:
        raise EasySpecError(
            f"failed: {', '.join(failed)}; what these results were before is still there"
        )


def run(args: argparse.Namespace) -> None:
    """Take the steps that were asked for."""
    steps = chosen(args.only, args.smoke)
    if args.smoke:
        with tempfile.TemporaryDirectory() as directory:
            results = Path(directory) / "results"
            results.mkdir()
            take(steps, results, "smoke")
        return
    check_writable(RESULTS / "table2.json")
    take(steps, RESULTS, "quick" if args.quick else "full")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.run", description=__doc__)
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {names}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small settings: minutes on 2 cores")
    size.add_argument(
        "--smoke", action="store_true", help="the smallest, into a directory that is thrown away"
    )
    return run_command("experiments.run", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
