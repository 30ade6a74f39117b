"""Measures everything anew, step by step, and writes the page of results: `python -m experiments.run --quick`.

Every step is one command in a process of its own. Without --quick all settings are the scripts' defaults. --smoke is
a subset small enough for continuous integration, and leaves the results alone.
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
from experiments import readme
from experiments.output import RESULTS


@dataclass(frozen=True)
class Step:
    """One result file. quick, smoke: the flags for small settings; --smoke leaves out a step without `smoke`."""

    name: str
    module: str
    quick: str = ""
    smoke: str | None = None


STEPS = (
    Step("table2", "experiments.table2", "--profile-phases --mesh 2 --max-new-tokens 64 --repeats 9 --fit-tokens 6000"),
    Step("spec_bench", "experiments.spec_bench", "--max-new-tokens 64"),
    Step("table4", "experiments.table4", "--max-new-tokens 64", "--lp-sizes 2 --max-new-tokens 8"),
    Step("frontier", "experiments.frontier", "--max-new-tokens 64",
         "--lp-strategies 0,1-3,4-7x4,8-10,11 --max-new-tokens 8"),
    Step("table5", "experiments.table5", "--mesh 2 --max-new-tokens 64 --repeats 9",
         "--lp-sizes 2 --max-new-tokens 8 --repeats 2"),
    Step("table6", "experiments.table6"),
    Step("table8", "experiments.table8", "--max-new-tokens 64"),
    Step("figure2", "experiments.figure2", "--max-new-tokens 32 --rounds 5 --repeats 5",
         "--mesh 2 --lp-size 2 --max-new-tokens 8 --rounds 2 --repeats 2"),
    Step("figure4", "experiments.acceptance",
         "--temperatures 0 --widths 1 4 --lp-sizes 1 2 3 4 5 --max-new-tokens 64 --batch-size 8",
         "--temperatures 0 --widths 1 --lp-sizes 1 2 --max-new-tokens 8"),
    Step("simulate", "experiments.simulate", "--topologies a100:8 h100:8 v5p:2x2x1"),
    Step("two_processes", "experiments.two_processes", "--repeats 9 --calls 4"),
    Step("peers", "experiments.peers", "--max-new-tokens 64 --repeats 3"),
)  # fmt: skip
"""A new experiment is one line here: its result file, its module, its small settings. All of them take --out."""


def arguments(step: Step, results: Path, size: str) -> list[str]:
    """A step's command; size: "full", "quick" or "smoke"."""
    flags = {"full": "", "quick": step.quick, "smoke": step.smoke or ""}[size]
    return [
        sys.executable,
        "-m",
        step.module,
        *flags.split(),
        "--out",
        str(results / f"{step.name}.json"),
    ]


def chosen(only: Sequence[str] | None, smoke: bool) -> list[Step]:
    """The steps to take. Raises EasySpecError for a name that is none."""
    names = [step.name for step in STEPS]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise EasySpecError(f"--only {unknown[0]!r} is none of {', '.join(names)}")
    return [
        step
        for step in STEPS
        if (not only or step.name in only) and not (smoke and step.smoke is None)
    ]


def take(steps: Sequence[Step], results: Path, size: str) -> None:
    """One after the other, and then the page beside the results. Raises EasySpecError naming the steps that failed."""
    failed = []
    for step in steps:
        begun = time.perf_counter()
        print(f"{step.name} …", flush=True)
        if subprocess.run(arguments(step, results, size), check=False).returncode:
            failed.append(step.name)
        print(f"{step.name}: {time.perf_counter() - begun:.0f} s", flush=True)
    readme.run(argparse.Namespace(results=results))
    if failed:
        raise EasySpecError(
            f"failed: {', '.join(failed)}; what these results were before is still there"
        )


def run(args: argparse.Namespace) -> None:
    """All that was asked for."""
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
    parser = Parser(prog="python -m experiments.run", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"of {', '.join(step.name for step in STEPS)}"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small settings: minutes on 2 cores")
    size.add_argument(
        "--smoke", action="store_true", help="the smallest, into a directory that is thrown away"
    )
    return run_command("experiments.run", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
