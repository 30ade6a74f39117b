"""Time a draft step where all-reduces are slow: `python -m experiments.two_processes`.

Two devices, each in a process with a core of its own, talk through Gloo, as hosts would. The same
two devices in one process on the same cores are the comparison. The draft is replicated, split by
tensor parallelism, or run in layer-parallel groups. Every sample times all ways.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from easyspec_jax import EasySpecError
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.timing import alternate
from easyspec_jax.options import resolve_dtype
from easyspec_jax.plan.steps import Pair
from easyspec_jax.tune.drawing import dress_bars, png
from experiments.lib.output import (
    RESULTS,
    align_right,
    prepare,
    publish,
    run_experiment,
    settings,
    show,
)
from experiments.lib.pair import add_flags, names, open_draft
from experiments.lib.picture import draft_title, note
from experiments.lib.processes import (
    OWN_FLAGS,
    add_process_flags,
    be_one_process,
    in_processes,
)
from experiments.lib.tables import Rows, distinct
from experiments.paper.table6 import PLAIN, draft_ways, name_of, step_cost, timed_cases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "experiments.two_processes"
DEVICES = 2
BASELINE = "TP"


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Time a step of every way, one figure a sample; processes take every step together."""
    cache_compilations()
    cases = [case for case in timed_cases(args, DEVICES) if case.name != PLAIN]
    return alternate(cases, args.repeats, args.calls)


def rows_of(
    args: argparse.Namespace, processes: int, seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Return a row for every way; ratios are between alternating samples."""
    collectives = collectives_of(args)
    return [
        {
            "processes": processes,
            "way": way,
            "collectives": collectives[way],
            "step_seconds": float(np.median(samples)),
            "deviation": float(np.std(samples)),
            "time_of_tp": float(np.median(np.divide(samples, seconds[BASELINE]))),
        }
        for way, samples in seconds.items()
    ]


def collectives_of(args: argparse.Namespace) -> dict[str, int]:
    """Count the collectives of a step in the traced program of every way."""
    config = open_draft(args).config
    dtype = np.dtype(resolve_dtype(args.dtype, "cpu", config.dtype))
    pair = Pair(config, config, dtype, str(DEVICES), 1, 1, args.context, args.context + 1)
    ways = draft_ways(args.lp_sizes, DEVICES)
    return {name_of(way): step_cost(pair, way, "cpu")[0].collectives for way in ways}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of both arrangements."""
    table = Table(
        "processes", "draft's step", "collectives", "ms", "× TP", box=None, pad_edge=False
    )
    align_right(table.columns[2:])
    for row in rows:
        figures = f"{1e3 * row['step_seconds']:.2f}", f"{row['time_of_tp']:.2f}"
        table.add_row(str(row["processes"]), row["way"], str(row["collectives"]), *figures)
    show(table)


TITLES = {2: "two processes, a core each", 1: "one process, the same two cores"}
COLORS = {2: "#0072b2", 1: "#e69f00"}
"""By the number of processes; from the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a bar for every way as PNG, in one panel for each number of processes.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    ways = distinct(measured["results"], "way")
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(ways)), dpi=120, layout="constrained")
    figure.suptitle(f"A step of {draft_title(measured)} on two devices", weight="bold", size=13)
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for axes, (processes, title) in zip(panels, TITLES.items(), strict=True):
        rows = {row["way"]: row for row in measured["results"] if row["processes"] == processes}
        times = [1e3 * rows[way]["step_seconds"] for way in ways]
        axes.barh(range(len(ways)), times, color=COLORS[processes], height=0.62)
        for place, way in enumerate(ways):
            text = f"{times[place]:.1f}, {rows[way]['time_of_tp']:.2f} × TP"
            note(axes, text, times[place], place)
        axes.set_title(title, size=11)
        axes.set_xlabel("milliseconds")
        axes.margins(x=0.3)
        dress_bars(axes)
        axes.set_yticks(
            range(len(ways)), [f"{way}\n{rows[way]['collectives']} collectives" for way in ways]
        )
        axes.set_ylim(len(ways) - 0.5, -0.5)
    return figure


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate a draft step by the way of splitting it."""
    return [
        {
            "processes": row["processes"],
            "way": row["way"],
            "collectives": row["collectives"],
            "ms a draft step": 1e3 * row["step_seconds"],
            "±": 1e3 * row["deviation"],
            "over TP": row["time_of_tp"],
        }
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it; or be one of the processes that measure."""
    if args.process_id is not None:
        be_one_process(PROGRAM, args, measure)
        return
    if min(args.repeats, args.calls, args.context) < 1:
        raise EasySpecError("--repeats, --calls and --context must be at least 1")
    prepare(args.out)
    open_draft(args)  # fail here once rather than in both processes
    between = in_processes(PROGRAM, args.words, DEVICES)
    rows = rows_of(args, DEVICES, between) + rows_of(args, 1, measure(args))
    print_table(rows)
    left_out = (*OWN_FLAGS, "questions", "mesh", "target", "draft")
    publish(args.out, settings(args, *left_out) | names(args), rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add_flags(parser)
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--context", type=int, default=256, help="tokens before the step (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--calls", type=int, default=8, help="calls of a step for one sample (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "two_processes.json")
    add_process_flags(parser, argv)
    return run_experiment(PROGRAM, parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
