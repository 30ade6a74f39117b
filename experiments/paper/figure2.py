"""Show what every device does in a round, as the paper's Figure 2: `python -m experiments.figure2`.

Plain decoding, a drafted chain (or tree) and EasySpec each run rounds under jax.profiler. Every
round is waited for, and the round of median duration is shown. Because profiling costs time, the
median round without it is measured too.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.table import Table

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.timing import alternate, round_case
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.tune.drawing import INK, dress_bars, png
from experiments.lib.output import (
    RESULTS,
    align_right,
    prepare,
    publish,
    run_experiment,
    settings,
    show,
)
from experiments.lib.pair import add_flags, names, open_pair, questions_of
from experiments.lib.picture import pair_title
from experiments.lib.tables import Rows
from experiments.paper.table2 import ONE_DEVICE, TENSOR_PARALLEL, Way, complete
from experiments.paper.timeline import (
    Timeline,
    by_bin,
    lane,
    middle,
    recorded,
    runs,
    timeline_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 4000
"""Bins in the longest round: a few for each pixel."""

NOTES = {
    "any": [
        "A lane is a device. Every round is waited for, so a round begins with its dispatch by "
        "the host; a collective's time includes the wait for the devices that come late. Shares "
        "are of the round under the profiler, which makes a round of many small operations "
        "longer.",
    ],
    "cpu": [
        "Virtual devices share the cores of one CPU: an operation's time includes that in which "
        "its thread waits for a core, and a collective's that in which other devices' do. Such "
        "shares tell nothing of accelerators.",
    ],
}


def open_ways(args: argparse.Namespace) -> list[Way]:
    """Open the ways to compare.

    Raises:
        EasySpecError: As open_model.
    """
    levels, width = args.num_speculative_tokens, args.tree_width if args.tree_width > 1 else None
    method = "sd" if width is None else "tree"
    exact = open_pair(
        args, SpeculativeConfig(method=method, num_speculative_tokens=levels, tree_width=width)
    )
    fuzzy = SpeculativeConfig(
        num_speculative_tokens=levels, tree_width=width, lp_size=args.lp_size, refit=args.refit
    )
    return [
        Way(TENSOR_PARALLEL if exact.mesh.size > 1 else ONE_DEVICE, exact.baseline()),
        Way(f"+{method}", exact),
        Way(
            f"EasySpec, N = {args.lp_size}",
            exact.variant(fuzzy, parse_mesh(args.mesh, group_size=args.lp_size)),
        ),
    ]


def row_of(way: Way, own: Timeline, bin_ns: float) -> dict[str, Any]:
    """Return the median round of a trace.

    Raises:
        EasySpecError: A device of the mesh is not in the trace.
    """
    if len(own.devices) != way.engine.mesh.size:
        raise EasySpecError(
            f"{way.name}: the trace shows {len(own.devices)} of {way.engine.mesh.size} devices"
        )
    begin, end = middle(own.rounds)
    edges = np.append(np.arange(begin, end, bin_ns), end)
    parts = {device: by_bin(own, device, edges) for device in own.devices}
    shares = {device: own.sum(axis=1) / (end - begin) for device, own in parts.items()}
    mean = np.mean(list(shares.values()), axis=0)
    return {
        "way": way.name,
        "mesh": dict(way.engine.mesh.shape),
        "traced_round_seconds": (end - begin) / 1e9,
        **dict(zip(("computing", "in_collectives", "idle"), mean.tolist(), strict=True)),
        "by_device": {device: share.tolist() for device, share in shares.items()},
        "bin_seconds": bin_ns / 1e9,
        "lanes": {device: lane(own) for device, own in parts.items()},
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every way."""
    questions, sampling = questions_of(args), SamplingParams(max_new_tokens=args.max_new_tokens)
    ways = open_ways(args)
    made = complete(ways, questions, sampling)
    cases, length = [], 2 * args.max_new_tokens
    for way in ways:
        programs = way.engine.programs(sampling)
        bounds = {"context": length // 2, "capacity": programs.sizes.capacity(length)}
        cases.append(round_case(way.name, programs, **bounds))
    seconds = alternate(cases, args.repeats, 1)
    traces = [timeline_of(recorded(case, args.rounds)) for case in cases]
    rounds = [middle(own.rounds) for own in traces]
    longest = max(end - begin for begin, end in rounds)
    rows = []
    for way, own in zip(ways, traces, strict=True):
        stats = [completion.stats for completion in made[way.name]]
        tokens = sum(one.decoded_tokens for one in stats) / sum(one.rounds for one in stats)
        figures = {
            "round_seconds": float(np.median(seconds[way.name])),
            "tokens_per_round": tokens,
        }
        rows.append(row_of(way, own, longest / BINS) | figures)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(
        "",
        "ms a round",
        "under the profiler",
        "computing",
        "in collectives",
        "idle",
        "tokens a round",
    )
    table.box, table.pad_edge = None, False
    align_right(table.columns[1:])
    for row in rows:
        table.add_row(
            row["way"],
            *(f"{1e3 * row[name]:.2f}" for name in ("round_seconds", "traced_round_seconds")),
            *(f"{row[name]:.0%}" for name in ("computing", "in_collectives", "idle")),
            f"{row['tokens_per_round']:.2f}",
        )
    show(table)


KINDS = {
    ".": ("idle", "#dcdcdc"),
    "x": ("in collectives, waiting included", "#e69f00"),
    "c": ("computing", "#0072b2"),
}
"""By the letter of a lane; from the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a panel for each way and a lane for each device as PNG, on one scale of time.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = measured["results"]
    lanes = max(len(row["lanes"]) for row in rows)
    figure = Figure(
        figsize=(12, 1.8 + len(rows) * (0.75 + 0.21 * lanes)), dpi=120, layout="constrained"
    )
    figure.suptitle(
        f"One round on every device: {pair_title(measured)}, --mesh {measured['mesh']}",
        weight="bold",
        size=13,
    )
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        _panel(axes, row)
    panels[-1].set_xlim(0, max(1e3 * row["traced_round_seconds"] for row in rows))
    panels[-1].set_xlabel("milliseconds since the round was dispatched")
    patches = [Patch(facecolor=color, label=name) for name, color in reversed(KINDS.values())]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure


def _panel(axes: "Axes", row: dict[str, Any]) -> None:
    milliseconds = 1e3 * row["bin_seconds"]
    for place, letters in enumerate(row["lanes"].values()):
        # Later kinds cover earlier ones where a bin fills only part of a pixel.
        for (_, color), shown in zip(KINDS.values(), (".xc", "xc", "c"), strict=True):
            bars = [
                (first * milliseconds, count * milliseconds)
                for first, count in runs(letters, shown)
            ]
            axes.broken_barh(bars, (place - 0.4, 0.8), facecolor=color, linewidth=0)
    kinds = {name: f"{row[name]:.0%}" for name in ("computing", "in_collectives", "idle")}
    shares = ", ".join(f"{name.replace('_', ' ')} {share}" for name, share in kinds.items())
    tokens = f"{row['tokens_per_round']:.2f} tokens a round"
    axes.set_title(f"{row['way']} (mesh {_split(row)}): {shares}; {tokens}", size=10.5, color=INK)
    dress_bars(axes)
    axes.set_yticks(range(len(row["lanes"])), list(row["lanes"]), size=8)
    axes.set_ylabel("device")
    axes.set_ylim(len(row["lanes"]) - 0.5, -0.5)


def _split(row: Mapping[str, Any]) -> str:
    """Write the mesh of a row."""
    return " × ".join(f"{size} {axis}" for axis, size in row["mesh"].items())


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate shares of the round under the profiler, as means over devices."""
    return [
        {
            "way": row["way"],
            "mesh": _split(row),
            "ms a round": 1e3 * row["round_seconds"],
            "ms under the profiler": 1e3 * row["traced_round_seconds"],
            "computing": row["computing"],
            "in collectives": row["in_collectives"],
            "idle": row["idle"],
            "tokens a round": row["tokens_per_round"],
        }
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it."""
    if args.rounds < 1:
        raise EasySpecError(f"--rounds {args.rounds} must be at least 1")
    cache_compilations()
    prepare(args.out)
    rows = measure(args)
    print_table(rows)
    notes = NOTES["any"] + NOTES.get(jax.devices(args.platform)[0].platform, [])
    fields = settings(args, "questions") | names(args) | {"notes": notes}
    publish(args.out, fields, rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.figure2", description=__doc__)
    add_flags(parser)
    parser.set_defaults(mesh="8")
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument(
        "--refit", default="none", metavar="DIR", help='"auto": the one next to the draft, if any'
    )
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--tree-width", type=int, default=1)
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="of texts; rounds are timed at that length"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds under the profiler")
    parser.add_argument("--repeats", type=int, default=15, help="rounds without the profiler")
    parser.add_argument("--out", type=Path, default=RESULTS / "figure2.json")
    return run_experiment("experiments.figure2", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
