"""The paper's Table 4, and what it leads to: `python -m experiments.table4 --draft DIR --chat [--refit DIR]`.

Cosines of what a group approximates, and how much of the exact draft's distribution is left at each depth, for every
number of layers that run at once; with --refit DIR also for the refits there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from easyspec_jax import SpeculativeConfig, demo
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.refit.fidelity import DEPTHS
from experiments.draw_table4 import draw
from experiments.fidelity import add_flags, measure_all
from experiments.output import RESULTS, prepare, publish, run_experiment, settings, show


def speculations(args: argparse.Namespace) -> list[SpeculativeConfig]:
    """Every way to draft that is asked for."""
    refits = ["none"] if args.refit is None else ["none", args.refit]
    return [
        SpeculativeConfig(lp_size=size, refit=refit) for size in args.lp_sizes for refit in refits
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """What was measured."""
    names = ["h", "q", "k", "v", "attn_out"]
    depths = [f"depth {depth + 1}" for depth in range(DEPTHS)]
    table = Table("N", "", *names, *depths, box=None, pad_edge=False)
    for row in rows:
        numbers = [*(row["cosine"][name] for name in names), *row["overlap"]]
        kind = str(row["lp_size"]), "refit" if row["refit"] else ""
        table.add_row(*kind, *(f"{number:.3f}" for number in numbers))
    show(table)


def run(args: argparse.Namespace) -> None:
    """Measures, prints, writes the JSON and draws it."""
    cache_compilations()
    prepare(args.out)
    rows = measure_all(args, speculations(args))
    print_table(rows)
    publish(
        args.out,
        settings(args, "prompts", "refit") | {"bundled": args.draft == demo.DRAFT},
        rows,
        draw,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.table4", description=__doc__)
    add_flags(parser)
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--refit", metavar="DIR", help="with a refit for each of the sizes")
    parser.add_argument("--out", type=Path, default=RESULTS / "table4.json")
    return run_experiment("experiments.table4", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
