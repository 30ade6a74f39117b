"""Measure how far drafts see ahead: `python -m experiments.acceptance`.

The grid of the paper's Figure 4, by tree width and number of layers at once, for several
temperatures and verifiers. Prints tables, writes JSON and draws it. None of the figures is a time.
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as fields_of
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.table import Table

from easyspec_jax import Completion, EasySpecError, Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.draft.grouping import format_layout
from easyspec_jax.draft.refit_file import refit_sizes
from easyspec_jax.options import Verifier
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.progress import bar
from easyspec_jax.tune.drawing import INK, SOFT, STYLE, WHITE, png
from experiments.lib.machine import machine
from experiments.lib.output import (
    RESULTS,
    as_json,
    measured_before,
    prepare,
    publish,
    run_experiment,
    save,
    settings,
    show,
)
from experiments.lib.pair import DATA, add_models, names, open_pair
from experiments.lib.tables import Rows, distinct, matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREEDY = "greedy"

Row = dict[str, Any]
"""The figures of one variant."""


@dataclass(frozen=True)
class Variant:
    """A way to sample, verify and draft.

    Attributes:
        lp_size: 1 is the exact draft, whose keys and values need no calibration.
    """

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
        """Return the engine's configuration.

        Args:
            num_speculative_tokens: Levels a round.
            refit: The directory with refits, if any.

        Raises:
            EasySpecError: The values do not go together.
        """
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
    refit_sizes: Collection[int] = (),
) -> list[Variant]:
    """List the grid, every variant once; at temperature 0 all verifiers are the same comparison."""
    grid = (
        Variant(temperature, verifier if temperature else GREEDY, width, lp_size, *draft)
        for temperature in temperatures
        for verifier in verifiers
        for width in widths
        for lp_size in lp_sizes
        for draft in _drafts(lp_size, refit_sizes)
    )
    return list(dict.fromkeys(grid))


def _drafts(lp_size: int, refit_sizes: Collection[int]) -> tuple[tuple[bool, bool], ...]:
    """Return the kinds of draft with this many layers at once: calibrated or not, refit or not."""
    if lp_size == 1:
        return (PLAIN,)
    return (PLAIN, UNCALIBRATED, REFIT) if lp_size in refit_sizes else (PLAIN, UNCALIBRATED)


def measure_grid(
    args: argparse.Namespace,
    prompts: Sequence[str],
    grid: Sequence[Variant],
    measured: Mapping[Variant, Row],
) -> Iterator[dict[Variant, Row]]:
    """Measure the acceptance of every variant, and yield all rows so far, in the grid's order.

    Args:
        args: The flags.
        prompts: What to complete.
        grid: The variants.
        measured: Rows of some of them that need not be measured.

    Raises:
        EasySpecError: A variant is impossible, which is known before any is measured.
    """
    configs = {
        variant: variant.speculative(args.num_speculative_tokens, args.refit) for variant in grid
    }
    sampling = {
        t: SamplingParams(t, seed=args.seed, max_new_tokens=args.max_new_tokens)
        for t in args.temperatures
    }
    layouts = dict.fromkeys(config.weights_key for config in configs.values())

    def opened(layout: SpeculativeConfig) -> Engine:
        return open_pair(args, layout)

    for layout in layouts:
        opened(layout)  # checks the layout without reading weights
    rows = dict(measured)
    missing = [variant for variant in grid if variant not in rows]
    with bar("Measuring", len(missing)) as advance:
        # What greedy and coupled texts are compared with.
        pair = opened(replace(configs[grid[0]].weights_key, verifier="coupled"))
        baseline = pair.baseline()
        wanted = dict.fromkeys(variant.temperature for variant in missing)
        plain = {t: complete(baseline, sampling[t], prompts, args) for t in wanted}
        for layout in layouts:
            alike = [variant for variant in missing if configs[variant].weights_key == layout]
            if not alike:
                continue
            # Only the draft is read anew: the target is shared.
            shape = parse_mesh(args.mesh, group_size=layout.lp_size)
            engine = pair.variant(layout, shape)
            for variant in alike:
                engine.speculative = configs[variant]  # the weights depend on the layout alone
                temperature = variant.temperature
                made = complete(engine, sampling[temperature], prompts, args)
                row = {"draft": variant.draft} | asdict(variant) | figures_of(engine, made)
                # Otherwise every draft makes another text of the same distribution.
                if variant.verifier in (GREEDY, "coupled"):
                    row["equals_plain"] = texts_of(made) == texts_of(plain[temperature])
                rows[variant] = row
                advance(1)
                yield {variant: rows[variant] for variant in grid if variant in rows}


AXES = ("widths", "lp_sizes", "temperatures", "verifiers", "command")
"""Settings that may differ between runs whose rows are put together."""


def by_variant(rows: Sequence[Row]) -> dict[Variant, Row]:
    """Find the variant of each row of a file."""
    names = [field.name for field in fields_of(Variant)]
    # Files from before there were refits do not say that a row has none.
    whole: list[Row] = [{"refit": False} | row for row in rows]
    return {Variant(**{name: row[name] for name in names}): row for row in whole}


def sizes_with_refit(args: argparse.Namespace) -> set[int]:
    """Return the sizes of groups that --refit has a refit for.

    Raises:
        EasySpecError: It has none for any of --lp-sizes.
    """
    if args.refit is None:
        return set()
    found = {lp_size for lp_size, mlp_lp_size in refit_sizes(Path(args.refit)) if mlp_lp_size == 1}
    if not found & set(args.lp_sizes):
        raise EasySpecError(
            f"--refit {args.refit} has no refit for any of --lp-sizes; fit one there"
        )
    return found


def complete(
    engine: Engine, sampling: SamplingParams, prompts: Sequence[str], args: argparse.Namespace
) -> list[Completion]:
    """Complete all prompts."""
    return list(engine.generate(prompts, sampling, chat=args.chat, batch_size=args.batch_size))


def texts_of(completions: Sequence[Completion]) -> list[list[int]]:
    """Return the token ids of every completion."""
    return [completion.token_ids for completion in completions]


def figures_of(engine: Engine, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return acceptance over all completions."""
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
    """Print a table for every way of sampling: a row a draft, a column a tree width."""
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


PANELS = {"mean_acceptance_length": "Tokens per target pass", "acceptance_rate": "Acceptance rate"}

COLORS = ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
MARKERS = "osD^vP"
"""By tree width, as are the colors; these are from the palette of Okabe and Ito."""

STROKES: dict[str, dict[str, Any]] = {
    "calibrated": {"linestyle": "-"},
    "not calibrated": {"linestyle": (0, (4, 2)), "markerfacecolor": WHITE},
    "refit": {"linestyle": (0, (1, 1.5))},
}
"""By how a fuzzy draft is kept near the exact one; refit drafts are calibrated too."""

OWN_STYLE = {"axes.titlesize": 11, "lines.markersize": 5, "figure.constrained_layout.h_pad": 0.08}


@dataclass(frozen=True)
class Line:
    """A tree width with one kind of fuzzy draft, over N; every line starts at the exact draft."""

    width: int
    kind: str
    style: dict[str, Any]

    def has(self, row: Row) -> bool:
        return row["tree_width"] == self.width and (
            row["lp_size"] == 1 or kind_of(row) == self.kind
        )


def kind_of(row: Row) -> str:
    """Return the key of STROKES for a row."""
    if row.get("refit"):
        return "refit"
    return "calibrated" if row["calibration"] else "not calibrated"


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Return a line for every width and kind; those of a width share a color."""
    widths, kinds = sorted({row["tree_width"] for row in rows}), {kind_of(row) for row in rows}
    return [
        Line(width, kind, {"color": color, "marker": marker} | stroke)
        for width, color, marker in zip(widths, cycle(COLORS), cycle(MARKERS), strict=False)
        for kind, stroke in STROKES.items()
        if kind in kinds
    ]


def draw(measured: dict[str, Any]) -> bytes:
    """Draw acceptance over N as PNG, a row of panels for each way of sampling.

    As the paper's Figure 4, with tokens per pass of the target instead of throughput.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured), STYLE | OWN_STYLE)


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    results = measured["results"]
    ways: dict[str, list[Row]] = {}
    for row in results:
        ways.setdefault(way_of(row), []).append(row)
    lines = lines_of(results)
    figure = Figure(figsize=(10, 1.2 + 3 * len(ways)), dpi=120, layout="constrained")
    figure.suptitle(title_of(measured), weight="bold", size=13)
    panels = figure.subplots(len(ways), len(PANELS), squeeze=False)
    for (way, rows), line in zip(ways.items(), panels, strict=True):
        for (name, title), axes in zip(PANELS.items(), line, strict=True):
            axes.set_title(f"{title}: {way}")
            draw_panel(axes, lines, rows, name)
    for axes in panels[-1]:
        axes.set_xlabel("N, draft layers that run at once")
    draw_legend(figure, lines)
    return figure


def way_of(row: Row) -> str:
    """Say how the row's tokens were chosen."""
    return (
        "greedy"
        if row["temperature"] == 0
        else f"temperature {row['temperature']:g}, {row['verifier']}"
    )


def draw_panel(axes: "Axes", lines: Sequence[Line], rows: Sequence[Row], name: str) -> None:
    """Draw one figure over N."""
    for line in reversed(lines):  # calibrated ones come last, on top
        points = sorted((row["lp_size"], row[name]) for row in rows if line.has(row))
        axes.plot(*zip(*points, strict=True), **line.style)
    axes.set_xticks(sorted({row["lp_size"] for row in rows}))
    axes.tick_params(colors=SOFT, labelcolor=INK)


def draw_legend(figure: "Figure", lines: Sequence[Line]) -> None:
    """Explain colors and strokes below the panels."""
    from matplotlib.lines import Line2D

    first = lines[0].kind
    widths = [
        Line2D([], [], **line.style, label=f"tree width {line.width}")
        for line in lines
        if line.kind == first
    ]
    kinds = dict.fromkeys(line.kind for line in lines)
    strokes = [
        Line2D([], [], color=SOFT, **STROKES[kind], marker="o", label=kind) for kind in kinds
    ]
    figure.legend(
        handles=[*widths, *strokes], loc="outside lower center", ncols=len(widths) + len(strokes)
    )


def title_of(measured: dict[str, Any]) -> str:
    """Name the pair and what was decoded."""
    target, draft = measured["target"], measured["draft"]
    pair = f"{target} drafting for itself" if target == draft else f"{target}, drafted by {draft}"
    texts = f"{len(measured['prompts'])} prompts of up to {measured['max_new_tokens']} tokens"
    levels = f"{measured['num_speculative_tokens']} levels a round"
    return f"{'The bundled pair' if measured['bundled'] else pair}: {levels}, {texts}"


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate acceptance at temperature 0 by width and N, and the loss against exact drafts."""
    greedy = matching(measured["results"], temperature=0)
    kinds, sizes = list(dict.fromkeys(map(kind, greedy))), distinct(greedy, "lp_size")
    table = []
    for width in distinct(greedy, "tree_width"):
        rows = matching(greedy, tree_width=width)
        exact = next((row["acceptance_rate"] for row in rows if row["lp_size"] == 1), None)
        for size in sizes:
            own = {kind(row): row["acceptance_rate"] for row in rows if row["lp_size"] == size}
            shown: dict[str, Any] = {"width": width, "N": "1, exact" if size == 1 else size}
            for name in kinds:
                shown[f"α, {name}"] = own.get(name)
                if size > 1 and exact is not None and name in own:
                    shown[f"loss, {name}"] = exact - own[name]
            table.append(shown)
    names = list(dict.fromkeys(name for row in table for name in row))
    return [{name: row.get(name) for name in names} for row in table]


def kind(row: Mapping[str, Any]) -> str:
    """Name the kind of a row's draft."""
    return "refit" if row.get("refit") else "calibrated" if row["calibration"] else "no calibration"


def run(args: argparse.Namespace) -> None:
    """Measure the grid, print it, write the JSON and draw it."""
    cache_compilations()
    prompts = read_prompts(
        args.prompt_file or DATA / ("prompts.txt" if args.target else "code_prompts.txt")
    )
    out = destination(args)
    refits = sizes_with_refit(args)
    grid = variants(args.temperatures, args.verifiers, args.widths, args.lp_sizes, refits)
    fields = settings(args, "prompt_file", "refit", "resume") | names(args) | {"prompts": prompts}
    fields["command"] = args.command.replace(" --resume", "")  # the rows are those of one run
    before = {}
    if args.resume:
        before = by_variant(measured_before(out, fields, "--resume", AXES))
    if before.keys() - set(grid):
        raise EasySpecError(
            f"--resume: {out} has rows of widths, sizes or ways of sampling that these flags leave "
            "out; name all of them, or give another --out"
        )
    rows = before
    for rows in measure_grid(args, prompts, grid, before):
        save(out, as_json(fields | {"machine": machine(args.platform), "results": rows.values()}))
    print_tables(list(rows.values()))
    publish(out, fields, list(rows.values()), draw)


def destination(args: argparse.Namespace) -> Path:
    """Return the JSON to write.

    Raises:
        EasySpecError: It cannot be written or drawn, which hours of measuring would find out late.
    """
    out = args.out or RESULTS
    if out.is_dir():
        out = out / ("acceptance.json" if args.target else "acceptance_demo.json")
    prepare(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.acceptance", description=__doc__)
    add_models(parser)
    parser.add_argument("--mesh", default="1")
    parser.add_argument("--platform")
    parser.add_argument(
        "--refit",
        metavar="DIR",
        help="also draft with the refits there, at those of --lp-sizes that have one",
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[1, 4, 8, 12], help="widths of the drafted tree"
    )
    parser.add_argument(
        "--lp-sizes", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="1 is the exact draft"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument(
        "--verifiers", nargs="+", choices=get_args(Verifier), default=["rejection", "coupled"]
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that --out has, and measure only those of the grid that it lacks",
    )
    return run_experiment("experiments.acceptance", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
