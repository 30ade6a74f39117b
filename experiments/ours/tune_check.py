"""Is the choice of tune the best there is? `python -m experiments.tune_check [--target DIR --draft DIR] --meshes 1 8`.

On each mesh: tunes; then decodes with every candidate of a grid, each beside plain decoding; then lets the choice, the
best of the grid and plain decoding alternate five times, which says by how much the choice falls short of the fastest.
What is not on the grid (other numbers of levels) is not tried.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from easyspec_jax import Engine
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.draft.refit_file import refit_sizes
from easyspec_jax.engine.tuned_file import label
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.progress import bar
from easyspec_jax.tune.bench import Sample
from easyspec_jax.tune.candidates import Candidate, Space, candidates
from easyspec_jax.tune.confirm import alternate, confirmed
from easyspec_jax.tune.tuning import MAX_NEW_TOKENS, default_sample, open_pair, tune_over
from experiments.draw_tune_check import draw
from experiments.output import RESULTS, prepare, publish, run_experiment, settings, show
from experiments.pair import names

ALTERNATIONS = 5


def speed(engine: Engine, sample: Sample, _: int) -> float:
    """Tokens a second over all texts of the sample."""
    completions = list(engine.generate(sample.prompts, sample.sampling, chat=sample.chat))
    return sum((done.stats for done in completions[1:]), completions[0].stats).tokens_per_second


def sweep(
    engine: Engine, sample: Sample, grid: Sequence[Candidate], times: int
) -> dict[Candidate, float]:
    """Every candidate's gain over plain decoding, which alternates with it. engine: see tune's open_pair."""
    plain, gains = engine.baseline(), {}
    plain.compile(sample.prompts, sample.sampling, chat=sample.chat)
    with bar("Sweeping", len(grid)) as advance:
        for candidate in grid:
            own = engine.variant(candidate.speculative, candidate.shape)
            own.compile(sample.prompts, sample.sampling, chat=sample.chat)
            ways = {
                name: partial(speed, way, sample) for name, way in (("own", own), ("plain", plain))
            }
            speeds = confirmed(alternate(ways, times, lambda number: True), "plain")
            gains[candidate] = speeds["own"] / speeds["plain"]
            advance(1)
    return gains


def open_all(args: argparse.Namespace) -> dict[str, Engine]:
    """By mesh, the largest first: JAX makes its virtual devices once. Raises EasySpecError as tune_over()."""
    meshes = sorted(args.meshes, key=lambda mesh: parse_mesh(mesh).size, reverse=True)
    return {mesh: open_pair(args.target, args.draft, mesh, None, None, "auto") for mesh in meshes}


def check(args: argparse.Namespace, mesh: str, engine: Engine) -> dict[str, Any]:
    """What was found on one mesh: tokens a second, gains over plain decoding. Raises EasySpecError as tune_over()."""
    assert engine.draft is not None
    layers = engine.draft.config.num_hidden_layers
    space = Space(
        [size for size in args.lp_sizes if size <= layers],
        args.tree_widths,
        max(args.levels),
        mlp_lp_sizes=args.mlp_lp_sizes,
        refits=refit_sizes(engine.draft.directory),
    )
    grid = [
        c
        for c in candidates(mesh, layers, space)
        if c.speculative.num_speculative_tokens in args.levels
    ]
    sample = default_sample(engine, bundled=args.target is None)
    sample = replace(sample, sampling=SamplingParams(max_new_tokens=args.max_new_tokens))
    tuned = tune_over(engine, mesh, sample, space, bar=bar)
    gains = sweep(engine, sample, grid, args.times)
    best = sorted(gains, key=lambda candidate: gains[candidate], reverse=True)[: args.best]
    chosen = Candidate(parse_mesh(tuned.choice.mesh), tuned.choice.speculative)
    plain = Candidate(chosen.shape, SpeculativeConfig(method="vanilla"))
    engines = {
        c: engine.variant(c.speculative, c.shape) for c in dict.fromkeys([chosen, *best, plain])
    }
    for own in engines.values():
        own.compile(sample.prompts, sample.sampling, chat=sample.chat)
    ways = {candidate: partial(speed, own, sample) for candidate, own in engines.items()}
    speeds = confirmed(alternate(ways, ALTERNATIONS, lambda number: True), plain)
    fastest = max(speeds, key=lambda candidate: speeds[candidate])
    return {
        "mesh": mesh,
        "seconds": tuned.seconds,
        "candidates": len(grid),
        "choice": _name(chosen),
        "choice_over_plain": speeds[chosen] / speeds[plain],
        "fastest": _name(fastest),
        "fastest_over_plain": speeds[fastest] / speeds[plain],
        "share_of_fastest": speeds[chosen] / speeds[fastest],
        "speeds": {_name(candidate): value for candidate, value in speeds.items()},
        "gains": {_name(candidate): gain for candidate, gain in gains.items()},
    }


def _name(candidate: Candidate) -> str:
    """In a line of a table; one device has no split to tell of."""
    if candidate.speculative.method == "vanilla":
        return "plain decoding"
    split = (
        f" on layer={candidate.shape.layer},tensor={candidate.shape.tensor}"
        if candidate.shape.size > 1
        else ""
    )
    return f"{label(candidate.speculative)}, {candidate.speculative.num_speculative_tokens} levels{split}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """What was found, a row a mesh."""
    table = Table(
        "mesh", "seconds", "choice", "over plain", "fastest of all", "over plain", "share", box=None
    )
    for row in rows:
        (own, gain), (other, most) = (
            (row[name], f"{row[f'{name}_over_plain']:.2f}") for name in ("choice", "fastest")
        )
        table.add_row(
            row["mesh"],
            f"{row['seconds']:.0f}",
            own,
            gain,
            other,
            most,
            f"{row['share_of_fastest']:.2f}",
        )
    show(table)


def run(args: argparse.Namespace) -> None:
    """Tunes and sweeps on each mesh, prints, writes the JSON and draws it."""
    prepare(args.out)
    cache_compilations()
    engines = open_all(args)
    rows = [check(args, mesh, engines[mesh]) for mesh in args.meshes]
    print_table(rows)
    publish(args.out, settings(args) | names(args), rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.tune_check", description=__doc__)
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--meshes", nargs="+", default=["1", "8"], metavar="MESH")
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[1, 2, 3, 4, 7])
    parser.add_argument("--mlp-lp-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tree-widths", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument(
        "--times", type=int, default=3, help="that each candidate of the sweep runs"
    )
    parser.add_argument(
        "--best", type=int, default=3, help="of the sweep, beside which the choice is run again"
    )
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="of each prompt")
    parser.add_argument("--out", type=Path, default=RESULTS / "tune_check.json")
    return run_experiment("experiments.tune_check", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
