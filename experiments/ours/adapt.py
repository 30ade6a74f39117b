"""Measure rounds that adapt: `python -m experiments.adapt [--target DIR --draft DIR]`.

Prompts of five kinds, whose texts are drafted well or badly, are completed plainly, by rounds of
every fixed number of levels, and by rounds that adapt, alternating prompt by prompt. Of each kind,
the adaptive speed is compared with plain decoding and with the best fixed number of levels. With
--processes 2 each device is in a process with a core of its own, as hosts would be.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from easyspec_jax import Engine, SpeculativeConfig
from easyspec_jax.cli.command import Parser
from experiments.lib.output import RESULTS, run_experiment
from experiments.lib.pair import add_flags, open_pair
from experiments.lib.processes import (
    OWN_FLAGS,
    add_process_flags,
    be_one_process,
    check_processes,
    in_processes,
)
from experiments.lib.tables import Rows
from experiments.ours.lookup import (
    check,
    circumstances,
    print_table,
    speeds_by_kind,
    timed,
    timed_rows,
    write,
)
from experiments.ours.peers import PLAIN

PROGRAM = "experiments.adapt"
ADAPTIVE = "adaptive"


def open_ways(args: argparse.Namespace) -> dict[str, Engine]:
    """Open plain decoding, every fixed number of levels, and rounds that adapt up to the most.

    With --prompt-lookup lookups alone are one of the fixed ways, too.

    Raises:
        EasySpecError: As open_model, or --prompt-lookup has no draft model to join.
    """

    def way(levels: int, adapt: bool = False) -> SpeculativeConfig:
        return SpeculativeConfig(
            method=args.method,
            num_speculative_tokens=levels,
            lp_size=args.lp_size,
            prompt_lookup=args.prompt_lookup,
            prompt_lookup_min=args.prompt_lookup_min,
            verifier="coupled",
            adapt=adapt,
            confidence_threshold=args.confidence_threshold if adapt else 0.0,
        )

    most = max(args.levels)
    adaptive = open_pair(args, way(most, adapt=True))
    fixed = {f"{levels} levels": way(levels) for levels in args.levels}
    if args.prompt_lookup:
        fixed["lookups alone"] = replace(way(most), method="ngram", prompt_lookup=False)
    opened = {name: adaptive.variant(own) for name, own in fixed.items()}
    return {PLAIN: adaptive.baseline()} | opened | {ADAPTIVE: adaptive}


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate speeds over plain decoding by kind of prompts, then those over the best fixed."""
    return [*speeds_by_kind(measured), over_best(measured["results"])]


def over_best(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the adaptive speed over that of the best fixed way, plain among them, of each kind.

    Medians of the ratios to plain decoding, which runs next to each.
    """
    table: dict[str, Any] = {"": f"{ADAPTIVE} over the best fixed"}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        speeds = {row["way"]: median(row["over_plain"]) for row in rows if row["kind"] == kind}
        own = speeds.pop(ADAPTIVE)
        table[kind] = f"{own / max(speeds.values()):.2f}"
    return table


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rows, and under what circumstances they were measured."""
    questions, engines = check(args), open_ways(args)
    _, measured = timed(args, questions, engines, args.temperature)
    rows = timed_rows(questions, measured)
    return {"results": rows, "circumstances": circumstances(engines[PLAIN])}


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON; or be one of the processes that measure.

    Raises:
        EasySpecError: --processes does not go with --mesh.
    """
    if args.process_id is not None:
        be_one_process(PROGRAM, args, measure)
        return
    check_processes(args)
    check(args)  # fail here once rather than in every process
    alone = args.processes == 1
    found = measure(args) if alone else in_processes(PROGRAM, args.words, args.processes)
    print_table(tabulate(found))
    write(args, found["circumstances"], found["results"], args.method != "ngram", *OWN_FLAGS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add_flags(parser)
    parser.add_argument("--method", choices=("sd", "easyspec", "ngram"), default="sd")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument("--prompt-lookup", action="store_true", help="also look up repeats")
    parser.add_argument("--prompt-lookup-min", type=int, default=default.prompt_lookup_min)
    parser.add_argument(
        "--confidence-threshold",
        choices=("auto",),
        default=0.0,
        help="let rounds that adapt end early, too",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--processes", type=int, default=1, help="as many as the mesh has devices, a core each"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "adapt.json")
    add_process_flags(parser, argv)
    return run_experiment(PROGRAM, parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
