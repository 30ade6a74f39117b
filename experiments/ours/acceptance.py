"""How far drafts see ahead, by tree width and layer-parallel size: `python -m experiments.acceptance`.

The grid of the paper's Figure 4, for several temperatures and verifiers. Prints tables, writes JSON and draws it.
No figure here is a time.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table

from easyspec_jax import Engine, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.options import Verifier
from easyspec_jax.progress import bar
from experiments.draw_acceptance import Row, draw
from experiments.output import RESULTS, prepare, publish, run_experiment, settings, show
from experiments.pair import names

HERE = Path(__file__).parent
GREEDY = "greedy"


@dataclass(frozen=True)
class Variant:
    """A way to sample, verify and draft; lp_size 1 is the exact draft, whose KV needs no calibration."""

    temperature: float
    verifier: Verifier | Literal["greedy"]
    tree_width: int
    lp_size: int
    calibration: bool
    refit: bool

    @property
    def draft(self) -> str:
        if self.lp_size == 1:
            return "exact"
        return (
            f"N = {self.lp_size}"
            + ("" if self.calibration else ", no calibration")
            + (", refit" * self.refit)
        )

    def speculative(self, num_speculative_tokens: int, refit: str | None) -> SpeculativeConfig:
        """The engine's configuration; refit: the directory with refits. Raises EasySpecError if there is none."""
        return SpeculativeConfig(
            num_speculative_tokens=num_speculative_tokens,
            tree_width=self.tree_width,
            lp_size=self.lp_size,
            calibration=self.calibration,
            refit=refit if self.refit and refit is not None else "none",
            verifier=None if self.verifier == GREEDY else self.verifier,
        )


PLAIN, UNCALIBRATED, REFIT = (True, False), (False, False), (True, True)
"""Whether a draft is calibrated, and whether it is refit."""


def variants(
    temperatures: Sequence[float],
    verifiers: Sequence[Verifier],
    widths: Sequence[int],
    lp_sizes: Sequence[int],
    refit: bool = False,
) -> list[Variant]:
    """The grid, every variant once: at temperature 0 all verifiers are one comparison."""
    fuzzy = (PLAIN, UNCALIBRATED, REFIT) if refit else (PLAIN, UNCALIBRATED)
    grid = (
        Variant(temperature, verifier if temperature else GREEDY, width, lp_size, *draft)
        for temperature in temperatures
        for verifier in verifiers
        for width in widths
        for lp_size in lp_sizes
        for draft in (fuzzy if lp_size > 1 else (PLAIN,))
    )
    return list(dict.fromkeys(grid))


def measure_grid(args: argparse.Namespace, prompts: Sequence[str]) -> list[Row]:
    """Every variant's acceptance. Raises EasySpecError for an impossible one before any is measured."""
    grid = variants(
        args.temperatures, args.verifiers, args.widths, args.lp_sizes, args.refit is not None
    )
    configs = {
        variant: variant.speculative(args.num_speculative_tokens, args.refit) for variant in grid
    }
    sampling = {
        t: SamplingParams(t, seed=args.seed, max_new_tokens=args.max_new_tokens)
        for t in args.temperatures
    }
    layouts = dict.fromkeys(config.weights_key for config in configs.values())

    def opened(layout: SpeculativeConfig) -> Engine:
        return open_model(
            args.target, args.draft, mesh=args.mesh, platform=args.platform, speculative=layout
        )

    for layout in layouts:
        opened(layout)  # which checks it and reads no weights
    rows: dict[Variant, Row] = {}
    with bar("Measuring", len(grid)) as advance:
        for layout in layouts:
            alike = [variant for variant in grid if configs[variant].weights_key == layout]
            engine = opened(layout)
            for variant in alike:
                engine.speculative = configs[variant]  # the weights depend on the layout alone
                measured = measure(engine, sampling[variant.temperature], prompts, args)
                rows[variant] = {"draft": variant.draft} | asdict(variant) | measured
                advance(1)
    return [rows[variant] for variant in grid]


def measure(
    engine: Engine, sampling: SamplingParams, prompts: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Acceptance over all prompts."""
    completions = list(
        engine.generate(prompts, sampling, chat=args.chat, batch_size=args.batch_size)
    )
    stats = sum((completion.stats for completion in completions[1:]), completions[0].stats)
    return {
        "groups": format_layout(engine.layout),
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance_rate": stats.acceptance_rate,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "accepted_per_position": stats.accepted_per_position,
    }


def print_tables(rows: Sequence[Row]) -> None:
    """A table for every way of sampling: drafts downward, tree widths to the right."""
    for (temperature, verifier), same in groupby(
        rows, key=lambda row: (row["temperature"], row["verifier"])
    ):
        cells = {(row["draft"], row["tree_width"]): row for row in same}
        drafts, widths = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
        title, caption = (
            f"temperature {temperature:g}, {verifier}",
            "tokens a round, acceptance rate",
        )
        table = Table(
            "draft", *(f"width {width}" for width in widths), title=title, caption=caption
        )
        for draft in drafts:
            found = (cells[draft, width] for width in widths)
            table.add_row(
                draft,
                *(f"{r['mean_acceptance_length']:.2f} {r['acceptance_rate']:.3f}" for r in found),
            )
        show(table)


def run(args: argparse.Namespace) -> None:
    """Measures the grid, prints it, writes the JSON and draws it."""
    cache_compilations()
    prompts = read_prompts(
        args.prompt_file or HERE / ("prompts.txt" if args.target else "code_prompts.txt")
    )
    out = destination(args)
    rows = measure_grid(args, prompts)
    print_tables(rows)
    fields = settings(args, "prompt_file", "refit") | names(args) | {"prompts": prompts}
    publish(out, fields, rows, draw)


def destination(args: argparse.Namespace) -> Path:
    """The JSON to write. Raises EasySpecError, before hours of measuring, if it cannot be written or drawn."""
    out = args.out or RESULTS
    if out.is_dir():
        out = out / ("acceptance.json" if args.target else "acceptance_demo.json")
    prepare(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.acceptance", description=__doc__)
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--platform")
    parser.add_argument(
        "--refit",
        metavar="DIR",
        help="also drafts with the refits there, one for each lp-size above 1",
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[1, 4, 8, 12], help="of the drafted tree"
    )
    parser.add_argument(
        "--lp-sizes", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="1 is the exact draft"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument(
        "--verifiers", nargs="+", choices=get_args(Verifier), default=get_args(Verifier)
    )
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument(
        "--prompt-file", type=Path, help="default: questions, or code for the bundled pair"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="default: results/acceptance.json, or …_demo.json for the bundled pair",
    )
    return run_experiment("experiments.acceptance", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
