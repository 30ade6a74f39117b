"""Measure on a GPU, step by step: `python -m experiments.gpu_hour --minutes 25 --out DIR`.

Steps run one after the other, the most valuable first, each in a process of its own with a budget
of time. A step that fails or takes too long costs only itself. Results are DIR/NAME.json and what
a step printed is DIR/NAME.log; DIR/summary.json has the state of all steps. A second call with the
same DIR goes on where the first one ended. --rehearse runs the same steps with tiny models on a
CPU.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table

from easyspec_jax import EasySpecError
from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.files import check_writable, write_whole
from experiments.gpu.headlines import Figures
from experiments.gpu.steps import OUT, STEPS, Step, named
from experiments.gpu.timed_process import run_timed
from experiments.lib.output import show

SUMMARY = "summary.json"

DONE, FAILED, OVER, NO_TIME, LARGE, ABSENT = (
    "done",
    "failed",
    "over time",
    "no time left",
    "device too small",
    "not available",
)
"""States of a step."""

FAULTS = (FAILED, OVER)
"""States that make the exit code 1. A step may be over time because its budget is too small."""


@dataclass(frozen=True)
class Record:
    """How a step ended.

    Attributes:
        state: One of the states above.
        command: Its command, see Step.template.
        seconds: How long it took.
        note: Why, if it is not done.
        figures: Its headline.
    """

    state: str
    command: str
    seconds: float = 0.0
    note: str = ""
    figures: Figures = field(default_factory=dict)


Records = dict[str, Record]
"""By the names of steps."""


@dataclass(frozen=True)
class Visit:
    """One run of this command.

    Attributes:
        directory: Where results go.
        rehearse: Whether it runs on a CPU.
        deadline: When it must end, by time.monotonic().
    """

    directory: Path
    rehearse: bool
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def result(self, step: Step) -> Path:
        """Return the file of a step's results."""
        return self.directory / f"{step.name}.json"

    def is_done(self, step: Step, records: Records) -> bool:
        """Tell whether an earlier run has all results of this very command.

        The environment is always looked at again: it shows whether the device is still the same.
        """
        record = records.get(step.name)
        return (
            step.name != "environment"
            and record is not None
            and (record.state, record.command) == (DONE, step.template(self.rehearse))
            and self.result(step).exists()
        )

    def obstacle(self, step: Step) -> Record | None:
        """Return why a step cannot be taken, or None."""
        command = step.template(self.rehearse)
        missing = [name for name in step.modules if not _exists(name)]
        if missing:
            return Record(ABSENT, command, note=f"{', '.join(missing)} is missing")
        held = None if self.rehearse else device_memory(self.directory)
        if held is not None and held < step.memory * 2**30:
            note = f"needs {step.memory:g} GiB, and the device has {held / 2**30:.0f}"
            return Record(LARGE, command, note=note)
        if self.left < 30 * step.minutes:
            note = f"{max(self.left, 0):.0f} s are less than half of its {step.minutes:g} minutes"
            return Record(NO_TIME, command, note=note)
        return None

    def take(self, step: Step) -> Record:
        """Run a step within its budget and what is left."""
        command, out = step.template(self.rehearse), self.result(step)
        platform = {"JAX_PLATFORMS": "cpu"} if self.rehearse else {}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | platform
        log = out.with_suffix(".log")
        seconds = min(60 * step.minutes, self.left)
        ended = run_timed(step.words(self.rehearse, out), log, seconds, environment)
        if ended.code == 0 and OUT not in command:
            write_whole(out, ended.output)
        figures = headline(step, out)
        if ended.code is None:
            return Record(OVER, command, ended.seconds, f"ended after {seconds:.0f} s", figures)
        if ended.code != 0 or not out.exists():
            note = f"exit code {ended.code}: {last_line(log)}"
            return Record(FAILED, command, ended.seconds, note, figures)
        return Record(DONE, command, ended.seconds, figures=figures)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is missing itself
        return False


def headline(step: Step, out: Path) -> Figures:
    """Return a step's figures; none if its file is missing or not as expected."""
    try:
        return step.headline(read_json(out))
    except (EasySpecError, KeyError, TypeError, IndexError):
        return {}


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank, shortened."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it printed nothing"


def device_memory(directory: Path) -> int | None:
    """Return the bytes of the device's memory, if the step `environment` has found out."""
    return _environment(directory).get("device_memory_bytes")


def device(directory: Path) -> Mapping[str, Any]:
    """Return the platform and kind of the device; empty if unknown."""
    here = _environment(directory).get("machine", {})
    return {name: here[name] for name in ("platform", "device_kind") if name in here}


def _environment(directory: Path) -> Mapping[str, Any]:
    path = directory / "environment.json"
    return read_json(path) if path.exists() else {}


def check_device(directory: Path, before: Mapping[str, Any], rehearse: bool) -> None:
    """Check that the steps will run where they are meant to.

    Args:
        directory: Where results go.
        before: device() of an earlier run.
        rehearse: Whether the steps are a rehearsal.

    Raises:
        EasySpecError: The machine has no GPU, or the results so far are another device's.
    """
    now = device(directory)
    if before and now and before != now:
        raise EasySpecError(
            f"--out {directory} has results of {before['device_kind']}, and this is "
            f"{now['device_kind']}; choose another directory"
        )
    if not rehearse and now.get("platform", "gpu") != "gpu":
        raise EasySpecError(f"JAX finds no GPU, only {now['device_kind']}; use --rehearse")


def saved(directory: Path) -> Records:
    """Read how the steps of an earlier run ended, if there was one."""
    path = directory / SUMMARY
    if not path.exists():
        return {}
    return {name: Record(**own) for name, own in read_json(path)["steps"].items()}


def in_order(steps: Sequence[Step], records: Records) -> list[Step]:
    """Put steps that had their chance in an earlier run behind all others."""
    return sorted(
        steps, key=lambda step: step.name in records and records[step.name].state in FAULTS
    )


def take_all(visit: Visit, steps: Sequence[Step], records: Records) -> None:
    """Take steps one after the other, and keep the summary up to date.

    Raises:
        EasySpecError: The device is not the one that the steps are for.
    """
    for step in in_order(steps, records):
        if visit.is_done(step, records):
            print(f"{step.name}: done already", flush=True)
            continue
        record = visit.obstacle(step)
        if record is None:
            print(f"{step.name}: {step.about} …", flush=True)
            before = device(visit.directory)
            record = visit.take(step)
            if step.name == "environment" and record.state == DONE:
                check_device(visit.directory, before, visit.rehearse)
        records[step.name] = record
        write_summary(visit, records)
        note = f" ({record.note})" if record.note else ""
        print(f"{step.name}: {record.state} after {record.seconds:.0f} s{note}", flush=True)


def write_summary(visit: Visit, records: Records) -> None:
    """Write the state of all steps."""
    steps = {step.name: asdict(records[step.name]) for step in STEPS if step.name in records}
    held = {"rehearsal": visit.rehearse, "device": device(visit.directory), "steps": steps}
    write_whole(visit.directory / SUMMARY, (json.dumps(held, indent=1) + "\n").encode())


def print_table(records: Records) -> None:
    """Print a line for each step."""
    table = Table("step", "state", "seconds", "figures")
    for step in STEPS:
        if step.name in records:
            record = records[step.name]
            figures = ", ".join(f"{name} {_shown(own)}" for name, own in record.figures.items())
            text = "; ".join(part for part in (figures, record.note) if part)
            table.add_row(step.name, record.state, f"{record.seconds:.0f}", text)
    show(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def chosen(only: Sequence[str] | None, skip: Sequence[str]) -> list[Step]:
    """Return the steps of --only, or all, without those of --skip.

    Raises:
        EasySpecError: One of them does not exist.
    """
    names = [step.name for step in STEPS]
    for flag, wanted in (("only", only or ()), ("skip", skip)):
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise EasySpecError(f"--{flag} {unknown[0]}: choose from {', '.join(names)}")
    return named([name for name in only or names if name not in skip])


def run(args: argparse.Namespace) -> int:
    """Take the steps that were asked for; return 1 if one failed or took too long."""
    if args.dry_compile is not None:
        # Imported here, because JAX may not start in a process that runs steps.
        from experiments.gpu.dry_compile import dry_compile

        out = None
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            out = args.out / f"dry_compile_{args.dry_compile}.json"
        return dry_compile(args.dry_compile, out)
    if args.out is None:
        raise EasySpecError("--out DIR is needed, for the results")
    if not args.minutes > 0:
        raise EasySpecError(f"--minutes {args.minutes:g} must be above 0")
    steps = chosen(args.only, args.skip)
    args.out.mkdir(parents=True, exist_ok=True)
    check_writable(args.out / SUMMARY)
    visit = Visit(args.out, args.rehearse, time.monotonic() + 60 * args.minutes)
    records = saved(args.out)
    # A machine that is taken back sends SIGTERM; the step's processes must not outlive this one.
    usual = signal.signal(signal.SIGTERM, _interrupt)
    try:
        take_all(visit, steps, records)
    finally:
        signal.signal(signal.SIGTERM, usual)
        print_table(records)
    return 1 if any(records[step.name].state in FAULTS for step in steps) else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.gpu_hour", description=__doc__)
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="made if it does not exist")
    parser.add_argument("--minutes", type=float, default=25, help="for all steps (default: 25)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"of {names}")
    parser.add_argument("--skip", nargs="+", metavar="STEP", default=())
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument(
        "--dry-compile",
        metavar="MACHINE",
        help='only compile what the steps would run, for a machine that is absent, such as "h100"',
    )
    return run_command("experiments.gpu_hour", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
