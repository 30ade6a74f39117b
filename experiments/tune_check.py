"""Is the choice of tune the best there is? `python -m experiments.tune_check [--target DIR --draft DIR] --mesh 8`.

Tunes; then decodes with every candidate of a grid, each beside plain decoding; then lets the choice and the best of the
grid alternate five times, and prints by how much the choice falls short of the fastest. What is not on the grid
(other numbers of levels) is not tried.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from easyspec_jax import Engine
from easyspec_jax.command import Parser, cache_compilations, run_command
from easyspec_jax.mesh import parse_mesh
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.progress import bar
from easyspec_jax.refit.store import refit_sizes
from easyspec_jax.tune.bench import Sample
from easyspec_jax.tune.candidates import Candidate, Space, candidates
from easyspec_jax.tune.confirm import alternate, confirmed
from easyspec_jax.tune.store import Choice, describe, label
from easyspec_jax.tune.tuning import default_sample, open_pair, tune
from experiments.output import check_destination, save

ALTERNATIONS = 5


def speed(engine: Engine, sample: Sample, _: int) -> float:
    """Tokens a second over all texts of the sample."""
    completions = list(engine.generate(sample.prompts, sample.sampling, chat=sample.chat))
    return sum((done.stats for done in completions[1:]), completions[0].stats).tokens_per_second


def sweep(engine: Engine, sample: Sample, grid: Sequence[Candidate], times: int) -> dict[Candidate, float]:
    """Every candidate's gain over plain decoding, which alternates with it. engine: see tune's open_pair."""
    plain, gains = engine.baseline(), {}
    plain.compile(sample.prompts, sample.sampling, chat=sample.chat)
    with bar("Sweeping", len(grid)) as advance:
        for candidate in grid:
            own = engine.variant(candidate.speculative, candidate.shape)
            own.compile(sample.prompts, sample.sampling, chat=sample.chat)
            ways = {name: partial(speed, way, sample) for name, way in (("own", own), ("plain", plain))}
            speeds = confirmed(alternate(ways, times, lambda number: True), "plain")
            gains[candidate] = speeds["own"] / speeds["plain"]
            advance(1)
    return gains


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was found. Raises EasySpecError as tune does."""
    engine = open_pair(args.target, args.draft, args.mesh, None, None, "auto")
    assert engine.draft is not None
    layers = engine.draft.config.num_hidden_layers
    space = Space(
        [size for size in args.lp_sizes if size <= layers],
        args.tree_widths,
        max(args.levels),
        mlp_lp_sizes=args.mlp_lp_sizes,
        refits=refit_sizes(engine.draft.directory),
    )
    grid = [c for c in candidates(args.mesh, layers, space) if c.speculative.num_speculative_tokens in args.levels]
    sample = default_sample(engine, bundled=args.target is None)
    tuned = tune(engine, args.mesh, sample, space, bar=bar)
    gains = sweep(engine, sample, grid, args.times)
    best = sorted(gains, key=lambda candidate: gains[candidate], reverse=True)[: args.best]
    chosen = Candidate(parse_mesh(tuned.choice.mesh), tuned.choice.speculative)
    plain = Candidate(chosen.shape, SpeculativeConfig(method="vanilla"))
    engines = {c: engine.variant(c.speculative, c.shape) for c in dict.fromkeys([chosen, *best, plain])}
    for own in engines.values():
        own.compile(sample.prompts, sample.sampling, chat=sample.chat)
    ways = {candidate: partial(speed, own, sample) for candidate, own in engines.items()}
    speeds = confirmed(alternate(ways, ALTERNATIONS, lambda number: True), plain)
    return {
        "mesh": args.mesh,
        "seconds": tuned.seconds,
        "choice": describe(tuned.choice),
        "candidates": len(grid),
        "fastest": describe(_as_choice(max(speeds, key=lambda c: speeds[c]), speeds, plain)),
        "speeds": {_name(candidate): value for candidate, value in speeds.items()},
        "share_of_fastest": speeds[chosen] / max(speeds.values()),
        "gains": {_name(candidate): gain for candidate, gain in gains.items()},
    }


def _as_choice(candidate: Candidate, speeds: dict[Candidate, float], plain: Candidate) -> Choice:
    return Choice(_mesh(candidate), candidate.speculative, speeds[candidate], speeds[plain])


def _mesh(candidate: Candidate) -> str:
    return f"layer={candidate.shape.layer},tensor={candidate.shape.tensor}"


def _name(candidate: Candidate) -> str:
    levels = candidate.speculative.num_speculative_tokens
    return f"{label(candidate.speculative)}, {levels} levels, {_mesh(candidate)}"


def _run(args: argparse.Namespace) -> None:
    check_destination(args.out)
    cache_compilations()
    found = check(args)
    save(args.out, json.dumps(found, indent=1) + "\n")
    Console().print({name: value for name, value in found.items() if name != "gains"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.tune_check", description=__doc__)
    parser.add_argument("--target", help="default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[1, 2, 3, 4, 7])
    parser.add_argument("--mlp-lp-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tree-widths", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--times", type=int, default=3, help="that each candidate of the sweep runs")
    parser.add_argument("--best", type=int, default=3, help="of the sweep, beside which the choice is run again")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    return run_command("experiments.tune_check", parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
