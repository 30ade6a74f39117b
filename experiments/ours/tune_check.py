"""Check the choice of tune against all candidates: `python -m experiments.tune_check --meshes 1 8`.

On each mesh it tunes, then decodes with every candidate of a grid, each alternating with plain
decoding. Then the choice, the best of the grid and plain decoding alternate five times, which shows
how far the choice is from the fastest. Numbers of levels off the grid are not tried.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from easyspec_jax import Engine
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.draft.refit_file import DIRECTORY, refit_sizes
from easyspec_jax.engine.tuned_file import label
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.progress import bar
from easyspec_jax.tune.bench import Sample
from easyspec_jax.tune.candidates import Candidate, Space, candidates
from easyspec_jax.tune.confirm import alternate, confirmed
from easyspec_jax.tune.drawing import SOFT, png
from easyspec_jax.tune.tuning import MAX_NEW_TOKENS, default_sample, open_pair, tune_over
from experiments.lib.output import RESULTS, prepare, publish, run_experiment, settings, show
from experiments.lib.pair import add_models, names
from experiments.lib.picture import pair_title
from experiments.lib.tables import Rows, labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALTERNATIONS = 5


def speed(engine: Engine, sample: Sample, _: int) -> float:
    """Return the tokens a second over all texts of the sample."""
    completions = list(engine.generate(sample.prompts, sample.sampling, chat=sample.chat))
    return sum((done.stats for done in completions[1:]), completions[0].stats).tokens_per_second


def sweep(
    engine: Engine, sample: Sample, grid: Sequence[Candidate], times: int
) -> dict[Candidate, float]:
    """Measure every candidate's gain over plain decoding, which alternates with it.

    Args:
        engine: As tune's open_pair returns it.
        sample: The prompts.
        grid: The candidates.
        times: How often each runs.
    """
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
    """Open the pair on every mesh, the largest first, because JAX makes its virtual devices once.

    Raises:
        EasySpecError: As tune_over().
    """
    meshes = sorted(args.meshes, key=lambda mesh: parse_mesh(mesh).size, reverse=True)
    models, links = (args.target, args.draft), args.allow_links
    return {
        mesh: open_pair(*models, mesh, None, None, "auto", allow_links=links) for mesh in meshes
    }


def check(args: argparse.Namespace, mesh: str, engine: Engine) -> dict[str, Any]:
    """Return the findings on one mesh: tokens a second and gains over plain decoding.

    Raises:
        EasySpecError: As tune_over().
    """
    assert engine.draft is not None
    layers = engine.draft.config.num_hidden_layers
    space = Space(
        [size for size in args.lp_sizes if size <= layers],
        args.tree_widths,
        max(args.levels),
        mlp_lp_sizes=args.mlp_lp_sizes,
        refits=refit_sizes(engine.draft.directory / DIRECTORY),
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
    """Name a candidate in a table; one device has no split to name."""
    if candidate.speculative.method == "vanilla":
        return "plain decoding"
    split = (
        f" on layer={candidate.shape.layer},tensor={candidate.shape.tensor}"
        if candidate.shape.size > 1
        else ""
    )
    levels = candidate.speculative.num_speculative_tokens
    return f"{label(candidate.speculative)}, {levels} levels{split}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row for each mesh."""
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


CHOICE, FASTEST = "#d55e00", "#0072b2"
"""From the palette of Okabe and Ito."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a panel for each mesh as PNG: every candidate of the sweep by its gain, and the choice.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    figure = Figure(figsize=(1.2 + 4.8 * len(rows), 4.6), dpi=120, layout="constrained")
    figure.suptitle(
        f"{pair_title(measured)}: tune's choice\namong all candidates", weight="bold", size=13
    )
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        _sweep(axes, row)
    panels[0].set_ylabel("times plain decoding")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _sweep(axes: "Axes", row: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    gains = sorted(row["gains"].values(), reverse=True)
    axes.plot(
        range(1, len(gains) + 1), gains, "o", color=SOFT, markersize=4, label="candidates, as swept"
    )
    axes.axhline(
        row["fastest_over_plain"],
        color=FASTEST,
        linestyle=(0, (4, 2)),
        label="the fastest, run again",
    )
    axes.axhline(row["choice_over_plain"], color=CHOICE, label="the choice, run beside it")
    axes.set_title(f"--mesh {row['mesh']}: {row['choice']}", size=9)
    axes.set_xlabel("candidates, best first")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate a row for each mesh."""
    names = {
        "mesh": "mesh",
        "seconds": "seconds of tuning",
        "choice": "choice",
        "choice_over_plain": "over plain",
        "candidates": "candidates swept",
        "fastest": "the fastest",
        "fastest_over_plain": "its gain over plain",
        "share_of_fastest": "choice over the fastest",
    }
    return [labelled(row, names) for row in measured["results"]]


def run(args: argparse.Namespace) -> None:
    """Tune and sweep on each mesh, print, write the JSON and draw it."""
    prepare(args.out)
    cache_compilations()
    engines = open_all(args)
    rows = [check(args, mesh, engines[mesh]) for mesh in args.meshes]
    print_table(rows)
    publish(args.out, settings(args) | names(args), rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.tune_check", description=__doc__)
    add_models(parser)
    parser.add_argument("--meshes", nargs="+", default=["1", "8"], metavar="MESH")
    parser.add_argument("--lp-sizes", type=int, nargs="+", default=[1, 2, 3, 4, 7])
    parser.add_argument("--mlp-lp-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tree-widths", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--times", type=int, default=3, help="runs of each candidate of the sweep")
    parser.add_argument(
        "--best", type=int, default=3, help="candidates that run again, next to the choice"
    )
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="of each text")
    parser.add_argument("--out", type=Path, default=RESULTS / "tune_check.json")
    return run_experiment("experiments.tune_check", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
