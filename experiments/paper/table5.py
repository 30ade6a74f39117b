"""Compare groups of attentions with groups of layers, Table 5: `python -m experiments.table5`.

Both run N layers at once. In a group of attentions the MLPs follow in order. In a group of whole
layers they run at once too (--mlp-lp-size N), each fed the group's input and the attention outputs
up to its own layer's. All ways complete the same prompts greedily, alternating; their draft steps
are timed as programs of their own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from easyspec_jax import SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.timing import Case, alone, alternate, pass_case
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.parallel.mesh import parse_mesh
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
from experiments.lib.pair import add_flags, names, open_pair, questions_of
from experiments.lib.picture import note, pair_title
from experiments.lib.tables import column, speeds
from experiments.paper.table2 import Way, complete, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, EXACT, ATTENTION, LAYERS = "plain decoding", "in order", "attention only", "whole layers"

CALLS = 2
"""Calls of each draft step in a row, every one of as many steps as a round makes."""


def open_ways(args: argparse.Namespace) -> dict[Way, dict[str, Any]]:
    """Open the ways to compare, plain decoding first, with what each runs at once.

    Raises:
        EasySpecError: As open_model.
    """
    common = {"num_speculative_tokens": args.num_speculative_tokens}
    width = args.tree_width if args.tree_width > 1 else None
    method = "sd" if width is None else "tree"
    exact = open_pair(args, SpeculativeConfig(method=method, tree_width=width, **common))
    ways = {
        Way(PLAIN, exact.baseline()): {"at_once": PLAIN, "lp_size": 1},
        Way(EXACT, exact): {"at_once": EXACT, "lp_size": 1},
    }
    for size in args.lp_sizes:
        for at_once, mlps in ((ATTENTION, 1), (LAYERS, size)):
            fuzzy = SpeculativeConfig(
                tree_width=width, lp_size=size, mlp_lp_size=mlps, refit=args.refit, **common
            )
            engine = exact.variant(fuzzy, parse_mesh(args.mesh, group_size=size))
            ways[Way(f"{at_once}, N = {size}", engine)] = {"at_once": at_once, "lp_size": size}
    return ways


def step_case(way: Way, sampling: SamplingParams, tokens: int) -> Case:
    """Return a way's draft step behind half a text of that many tokens."""
    programs, draft = way.engine.programs(sampling), way.engine.load()[1]
    assert draft is not None
    return pass_case(
        way.name,
        alone(way.engine.mesh, draft),
        programs.config.width,
        run_fuzzy,
        context=tokens // 2,
        capacity=programs.sizes.capacity(tokens),
        loops=max(1, programs.config.levels - 1),
    )


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every way."""
    questions, sampling = questions_of(args), SamplingParams(max_new_tokens=args.max_new_tokens)
    ways = open_ways(args)
    rows = rows_of("all", 0.0, complete(list(ways), questions, sampling))
    drafted = [way for way in ways if way.engine.draft is not None]
    seconds = alternate(
        [step_case(way, sampling, 2 * args.max_new_tokens) for way in drafted], args.repeats, CALLS
    )
    return [
        row
        | about
        | {
            "groups": format_layout(way.engine.layout) if way in drafted else None,
            "refit": way.engine.refit is not None,
            "step_seconds": float(np.median(seconds[way.name])) if way in drafted else None,
        }
        for row, (way, about) in zip(rows, ways.items(), strict=True)
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(
        "at once", "α", "ms a draft step", "tokens/s", "speed-up", box=None, pad_edge=False
    )
    align_right(table.columns[1:])
    for row in rows:
        rate, step = row["acceptance_rate"], row["step_seconds"]
        table.add_row(
            row["way"],
            "" if rate is None else f"{rate:.3f}",
            "" if step is None else f"{1e3 * step:.2f}",
            f"{100 / row['seconds_per_100_tokens']:.1f}",
            f"{row['speedup']:.2f} ± {row['speedup_deviation']:.2f}",
        )
    show(table)


COLORS = {"in order": "#000000", "attention only": "#0072b2", "whole layers": "#e69f00"}
"""From the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw acceptance, the time of a draft step and the speed-up by what runs at once, as PNG.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in measured["results"] if row["acceptance_rate"] is not None]
    panels = {
        "acceptance rate": column(rows, "acceptance_rate"),
        "milliseconds a draft step": [1e3 * row["step_seconds"] for row in rows],
        "speed over plain decoding": column(rows, "speedup"),
    }
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(f"{pair_title(measured)}, --mesh {measured['mesh']}", weight="bold", size=13)
    for axes, (name, values) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        axes.barh(
            range(len(rows)), values, color=[COLORS[row["at_once"]] for row in rows], height=0.62
        )
        for place, value in enumerate(values):
            note(axes, f"{value:.2f}", value, place)
        axes.set_xlabel(name)
        axes.margins(x=0.16)
        dress_bars(axes)
        axes.set_yticks(range(len(rows)), column(rows, "way"))
        axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


tabulate = speeds
"""Rows for the page of results."""


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it."""
    cache_compilations()
    prepare(args.out)
    rows = measure(args)
    print_table(rows)
    publish(args.out, settings(args, "questions") | names(args), rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.table5", description=__doc__)
    add_flags(parser)
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument(
        "--refit", default="none", metavar="DIR", help='"auto": those next to the draft, if any'
    )
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--tree-width", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15, help="samples of every draft step")
    parser.add_argument("--out", type=Path, default=RESULTS / "table5.json")
    return run_experiment("experiments.table5", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
