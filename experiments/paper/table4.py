"""Measure the paper's Table 4: `python -m experiments.table4 --draft DIR --chat [--refit DIR]`.

For every number of layers at once: cosines of what a group approximates, and how much is left of
the exact draft's distribution at each depth; with --refit DIR also for the refits there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from easyspec_jax import SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.refit.fidelity import DEPTHS
from easyspec_jax.tune.drawing import SOFT, WHITE, png
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings, show
from experiments.lib.pair import draft_name
from experiments.lib.picture import draft_title
from experiments.lib.tables import Rows, distinct, overlaps
from experiments.ours.fidelity import add_flags, measure_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speculations(args: argparse.Namespace) -> list[SpeculativeConfig]:
    """List every way to draft that is asked for."""
    refits = ["none"] if args.refit is None else ["none", args.refit]
    return [
        SpeculativeConfig(lp_size=size, refit=refit) for size in args.lp_sizes for refit in refits
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    names = ["h", "q", "k", "v", "attn_out"]
    depths = [f"depth {depth + 1}" for depth in range(DEPTHS)]
    table = Table("N", "", *names, *depths, box=None, pad_edge=False)
    for row in rows:
        numbers = [*(row["cosine"][name] for name in names), *row["overlap"]]
        kind = str(row["lp_size"]), "refit" if row["refit"] else ""
        table.add_row(*kind, *(f"{number:.3f}" for number in numbers))
    show(table)


COLORS = ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"
"""By group size, as are the colors; these are from the palette of Okabe and Ito."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw how much of the exact draft's distribution is left by depth, as PNG.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = measured["results"]
    sizes = distinct(rows, "lp_size")
    looks = dict(zip(sizes, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    figure = Figure(figsize=(7, 4.8), dpi=120, layout="constrained")
    title = f"What fuzzy passes of {draft_title(measured)} keep\nof its distribution"
    figure.suptitle(title, weight="bold", size=13)
    axes = figure.subplots()
    for row in rows:
        color, marker = looks[row["lp_size"]]
        line, face = ("-", color) if row["refit"] else ((0, (4, 2)), WHITE)
        style = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": line}
        axes.plot(range(1, len(row["overlap"]) + 1), row["overlap"], **style)
    axes.set_xticks(range(1, 1 + max(len(row["overlap"]) for row in rows)))
    axes.set_xlabel("draft depth")
    axes.set_ylabel("Σ min(p fuzzy, p exact)")
    handles = [
        Line2D([], [], color=c, marker=m, label=f"N = {size}") for size, (c, m) in looks.items()
    ]
    if any(row["refit"] for row in rows):
        handles += [
            Line2D([], [], color=SOFT, linestyle="-", marker="o", label="refit"),
            Line2D(
                [],
                [],
                color=SOFT,
                linestyle=(0, (4, 2)),
                marker="o",
                markerfacecolor=WHITE,
                label="plain",
            ),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate every way to draft."""
    table = []
    for row in measured["results"]:
        shown = {"N": row["lp_size"], "refit": "yes" if row["refit"] else "no"}
        for name, value in row["cosine"].items():
            shown[name.replace("attn_out", "attention output")] = value
        table.append(shown | overlaps(row))
    return table


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it."""
    cache_compilations()
    prepare(args.out)
    rows = measure_all(args, speculations(args))
    print_table(rows)
    publish(
        args.out,
        settings(args, "prompts", "refit") | draft_name(args),
        rows,
        draw,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.table4", description=__doc__)
    add_flags(parser)
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--refit", metavar="DIR", help="with a refit for each of the sizes")
    parser.add_argument("--out", type=Path, default=RESULTS / "table4.json")
    return run_experiment("experiments.table4", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
