"""Measure what ending drafts early gains: `python -m experiments.early_end`.

Rounds of several fixed numbers of levels are compared with rounds of the most levels that end where
no path is likely enough. Tokens and draft steps a round are counted; a speed is estimated from them
for several costs of a step. None of the figures is a time.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.progress import bar
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    as_json,
    check_destination,
    run_experiment,
    save,
    settings,
)
from experiments.lib.pair import DATA, add_models, names, open_pair
from experiments.lib.tables import Rows
from experiments.ours.acceptance import complete, figures_of, texts_of
from experiments.ours.lookup import print_table

Row = dict[str, Any]

COSTS = (0.02, 0.05, 0.1, 0.2)
"""Times of a draft step, over that of all else in a round."""


def ways(args: argparse.Namespace) -> list[SpeculativeConfig]:
    """List the ways to draft: fixed numbers of levels, then early ends of the most levels.

    Raises:
        EasySpecError: The values do not go together.
    """

    def way(levels: int, threshold: float = 0.0) -> SpeculativeConfig:
        return SpeculativeConfig(
            num_speculative_tokens=levels,
            tree_width=args.tree_width,
            lp_size=args.lp_size,
            verifier=args.verifier,
            refit="none",
            confidence_threshold=threshold,
        )

    if not all(threshold > 0 for threshold in args.thresholds):
        raise EasySpecError("--thresholds are above 0; --levels are measured without one")
    early = [way(max(args.levels), threshold) for threshold in args.thresholds]
    return [*map(way, sorted(args.levels)), *early]


def measure(args: argparse.Namespace, prompts: Sequence[str]) -> list[Row]:
    """Return a row for every temperature and way.

    Raises:
        EasySpecError: As open_model.
    """
    every, rows = ways(args), []
    engine = open_pair(args, every[0])
    with bar("Measuring", len(every) * len(args.temperatures)) as advance:
        for temperature in args.temperatures:
            sampling = SamplingParams(
                temperature, seed=args.seed, max_new_tokens=args.max_new_tokens
            )
            plain = texts_of(complete(engine.baseline(), sampling, prompts, args))
            for way in every:
                engine.speculative = way  # all of them draft with the same weights
                made = complete(engine, sampling, prompts, args)
                figures = figures_of(engine, made)
                row = {
                    "temperature": temperature,
                    "levels": way.num_speculative_tokens,
                    "confidence_threshold": way.confidence_threshold,
                }
                if temperature == 0 or args.verifier == "coupled":
                    row["equals_plain"] = texts_of(made) == plain
                row |= figures
                rows.append(row | {"steps": steps(row)})
                advance(1)
    return rows


def steps(row: Mapping[str, Any]) -> float:
    """Return the draft steps of a round on average; the first level needs none.

    Without a threshold all levels are drafted, though those past the end of a text do not count as
    drafted. With one, those positions are missing, so the figure is slightly low.
    """
    if not row["confidence_threshold"]:
        return row["levels"] - 1
    return row["drafted"] / row["rounds"] - 1


def speed(row: Mapping[str, Any], cost: float) -> float:
    """Return tokens in the time of a round without steps, if a step takes `cost` of it."""
    return row["mean_acceptance_length"] / (1 + cost * steps(row))


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate counts, and estimated speeds over that of the best fixed number of levels."""
    table, rows = [], measured["results"]
    for row in rows:
        fixed = [
            other
            for other in rows
            if not other["confidence_threshold"] and other["temperature"] == row["temperature"]
        ]
        cells = {
            "T": f"{row['temperature']:g}",
            "levels": row["levels"],
            "threshold": f"{row['confidence_threshold']:g}",
            "tokens a round": f"{row['mean_acceptance_length']:.2f}",
            "steps a round": f"{steps(row):.2f}",
            "α": f"{row['acceptance_rate']:.3f}",
        }
        for cost in COSTS:
            best = max(speed(other, cost) for other in fixed)
            cells[f"estimate, step = {cost:g}"] = f"{speed(row, cost) / best:.2f}"
        table.append(cells)
    return table


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON."""
    cache_compilations()
    check_destination(args.out)
    prompts = read_prompts(args.prompt_file)[: args.prompts]
    rows = measure(args, prompts)
    print_table(tabulate({"results": rows}))
    fields = settings(args) | names(args)
    save(args.out, as_json(fields | {"machine": machine(args.platform), "results": rows}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.early_end", description=__doc__)
    add_models(parser)
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--platform")
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument("--tree-width", type=int, default=1)
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[2, 3, 5, 8, 12, 16], help="fixed numbers"
    )
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.5, 0.7]
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--verifier", choices=("rejection", "coupled"), default="coupled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--prompts", type=int, default=24, help="how many of the file")
    parser.add_argument("--prompt-file", type=Path, default=DATA / "code_openings.txt")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "early_end.json")
    return run_experiment("experiments.early_end", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
