"""Plot fidelity against collectives: `python -m experiments.frontier --draft DIR --chat`.

The more runs at once, the fewer collectives a fuzzy pass waits for, and the less it keeps of the
draft's distribution. Shows how much each layout keeps at each depth; with --refit DIR also with the
refits there, for the layouts that have one (`python -m easyspec_jax.refit --lp-strategy S --out
DIR` makes them).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from easyspec_jax import EasySpecError, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.draft.grouping import Layout, format_layout, layout_of, paper_groups
from easyspec_jax.draft.refit_file import find
from easyspec_jax.refit.fidelity import DEPTHS
from easyspec_jax.tune.drawing import png
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings, show
from experiments.lib.pair import draft_name, open_draft
from experiments.lib.picture import draft_title
from experiments.lib.tables import Rows, column, distinct, matching, overlaps
from experiments.ours.fidelity import add_flags, measure_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def default_strategies(num_layers: int) -> list[str]:
    """List the paper's groups of two to four: attentions only, MLPs in pairs, and whole layers."""
    layouts = [
        Layout.uniform(paper_groups(num_layers, lp_size), mlp_lp_size)
        for lp_size, mlp_lp_size in product((2, 3, 4), (1, 2, 4))
    ]
    return [format_layout(layout) for layout in dict.fromkeys(layouts)]


def ways(strategies: Sequence[str], refit: Path | None, num_layers: int) -> list[SpeculativeConfig]:
    """List every layout as it is, and refit where the directory has a refit for it.

    Raises:
        EasySpecError: The directory has none.
    """
    plain = [SpeculativeConfig(lp_strategy=strategy, refit="none") for strategy in strategies]
    if refit is None:
        return plain
    held = [way for way in plain if find(refit, way, layout_of(way, num_layers)).is_file()]
    if not held:
        raise EasySpecError(
            f"--refit {refit} has none for these layouts; run easyspec_jax.refit --lp-strategy S"
        )
    return [*plain, *(replace(way, refit=str(refit)) for way in held)]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows, plain layouts first."""
    depths = [f"depth {depth + 1}" for depth in range(DEPTHS)]
    table = Table("collectives", "MLPs in a row", "", *depths, "layout", box=None, pad_edge=False)
    for row in rows:
        counts = (
            str(row["collectives"]),
            str(row["sequential_mlps"]),
            "refit" if row["refit"] else "",
        )
        table.add_row(*counts, *(f"{overlap:.3f}" for overlap in row["overlap"]), row["groups"])
    show(table)


LOOKS = (("#000000", "o"), ("#0072b2", "s"), ("#d55e00", "D"), ("#56b4e9", "^"))
"""By depth; from the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a curve for each depth as PNG, through the layouts that no other beats at that depth.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    kinds = sorted(distinct(rows, "refit"))
    figure = Figure(figsize=(1.2 + 5.2 * len(kinds), 4.8), dpi=120, layout="constrained")
    title = f"What a fuzzy pass of {draft_title(measured)} keeps\nby what it waits for"
    figure.suptitle(title, weight="bold", size=13)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _curves(axes, matching(rows, refit=kind))
        axes.set_title("with a refit" if kind else "plain", size=11)
    panels[0].set_ylabel("Σ min(p fuzzy, p exact)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS)
    )
    return figure


def _curves(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    places = column(rows, "collectives")
    for depth, (color, marker) in enumerate(LOOKS):
        values = [row["overlap"][depth] for row in rows]
        axes.plot(places, values, marker, color=color, markersize=5, label=f"depth {depth + 1}")
        axes.plot(*zip(*frontier(rows, depth), strict=True), color=color, linewidth=1.2)
    axes.set_xlabel("collectives of a fuzzy pass")
    axes.locator_params(axis="x", integer=True)


def frontier(rows: Sequence[dict[str, Any]], depth: int) -> list[tuple[int, float]]:
    """Find the layouts that keep more than all others with as few collectives or fewer.

    Returns:
        Collectives and overlap of each, fewest collectives first.
    """
    found: list[tuple[int, float]] = []
    for row in sorted(rows, key=lambda row: (row["collectives"], -row["overlap"][depth])):
        if not found or row["overlap"][depth] > found[-1][1]:
            found.append((row["collectives"], row["overlap"][depth]))
    return found


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate every layout."""
    return [
        {"collectives": row["collectives"], "MLPs in a row": row["sequential_mlps"]}
        | {"refit": "yes" if row["refit"] else "no"}
        | overlaps(row)
        | {"layout": row["groups"]}
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it."""
    cache_compilations()
    prepare(args.out)
    layers = open_draft(args).config.num_hidden_layers
    asked = ways(args.lp_strategies or default_strategies(layers), args.refit, layers)
    rows = sorted(measure_all(args, asked), key=lambda row: (row["refit"], -row["collectives"]))
    print_table(rows)
    publish(
        args.out,
        settings(args, "prompts", "refit") | draft_name(args),
        rows,
        draw,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.frontier", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--lp-strategies",
        nargs="+",
        metavar="S",
        help="default: the paper's groups of two to four, one, two or all MLPs at a time",
    )
    parser.add_argument(
        "--refit", type=Path, metavar="DIR", help="with a refit for some of the layouts"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier.json")
    return run_experiment("experiments.frontier", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
