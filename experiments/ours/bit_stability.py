"""Compare speculative and plain texts in narrow types: `python -m experiments.bit_stability`.

Products of one row and of several are rounded differently, so in bfloat16 a near-tie may fall the
other way under speculation. With `bit_stable` it may not. Both modes complete the same prompts,
alternating batch by batch. Where greedy texts differ, the gap between the target's logits of the
two tokens is recorded. The choice of coupled ones depends on noise as well.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from easyspec_jax import Completion, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from experiments.lib.divergence import NextLogits, divergence, next_logits
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    align_right,
    as_json,
    check_destination,
    run_experiment,
    save,
    settings,
    show,
)
from experiments.lib.pair import DATA, add_flags, names, open_pair
from experiments.lib.questions import code_questions
from experiments.lib.tables import Rows
from experiments.paper.table2 import Way, complete

PLAIN, DRAFTED = "plain", "speculative"
MODES = {"ordinary": False, "bit-stable": True}
"""Names of both modes, and the field `bit_stable` of each."""


def measure(args: argparse.Namespace, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for every temperature and mode.

    Raises:
        EasySpecError: As open_model.
    """
    speculative = SpeculativeConfig(
        num_speculative_tokens=args.num_speculative_tokens,
        lp_size=args.lp_size,
        verifier="coupled",
    )
    pair, ways = open_pair(args, speculative), []
    for mode, bit_stable in MODES.items():
        engine = pair.variant(replace(speculative, bit_stable=bit_stable))
        ways += [Way(f"{mode} {PLAIN}", engine.baseline()), Way(f"{mode} {DRAFTED}", engine)]
    logits, rows = next_logits(pair), []
    for temperature in args.temperatures:
        sampling = SamplingParams(temperature, seed=args.seed, max_new_tokens=args.max_new_tokens)
        made = complete(ways, code_questions(prompts), sampling, args.batch_size)
        rows += [row_of(mode, temperature, made, logits) for mode in MODES]
    return rows


def row_of(
    mode: str, temperature: float, made: Mapping[str, Sequence[Completion]], logits: NextLogits
) -> dict[str, Any]:
    """Compare the two ways of one mode; times are over plain decoding in the ordinary mode."""
    plain, drafted = made[f"{mode} {PLAIN}"], made[f"{mode} {DRAFTED}"]
    found = [
        divergence(logits, one.prompt_ids, one.token_ids, other.token_ids)
        for one, other in zip(plain, drafted, strict=True)
    ]
    different = [each for each in found if each is not None]
    ordinary = _seconds(made[f"ordinary {PLAIN}"])
    stats = sum((completion.stats for completion in drafted[1:]), drafted[0].stats)
    return {
        "mode": mode,
        "temperature": temperature,
        "prompts": len(plain),
        "different": len(different),
        "places": [each.place for each in different],
        "logit_gaps": [] if temperature else [each.logit_gap for each in different],
        "plain_time": float(np.median(_seconds(plain) / ordinary)),
        "speculative_time": float(np.median(_seconds(drafted) / ordinary)),
        "acceptance_rate": stats.acceptance_rate,
    }


def _seconds(completions: Sequence[Completion]) -> np.ndarray:
    """Return each completion's seconds a token, the first token not counted."""
    stats = [completion.stats for completion in completions]
    return np.array([own.decode_seconds / max(1, own.decoded_tokens) for own in stats])


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(*tabulate({"results": rows})[0], box=None, pad_edge=False)
    align_right(table.columns[2:])
    for row in tabulate({"results": rows}):
        table.add_row(
            *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    show(table)


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate how many texts differ, how near the ties were, and what each mode takes."""
    return [
        {
            "mode": row["mode"],
            "T": f"{row['temperature']:g}",
            "prompts": row["prompts"],
            "texts that differ": row["different"],
            "largest logit gap": max(row["logit_gaps"], default=""),
            "plain, time over ordinary": row["plain_time"],
            "speculative": row["speculative_time"],
            "α": row["acceptance_rate"],
        }
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON."""
    cache_compilations()
    check_destination(args.out)
    prompts = read_prompts(args.prompt_file)[: args.prompts]
    rows = measure(args, prompts)
    print_table(rows)
    fields = settings(args, "questions") | names(args)
    save(args.out, as_json(fields | {"machine": machine(args.platform), "results": rows}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.bit_stability", description=__doc__)
    add_flags(parser)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--prompts", type=int, default=20, help="how many of the file")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--prompt-file", type=Path, default=DATA / "refit_prompts.txt")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "bit_stability.json")
    return run_experiment("experiments.bit_stability", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
