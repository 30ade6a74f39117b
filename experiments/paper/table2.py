"""Measure the paper's Table 2 on this machine: `python -m experiments.table2 --mesh 8`.

Every way of decoding completes the same prompts, alternating prompt by prompt because machines
drift. With --processes 2 each device is in a process with a core of its own, as hosts would be;
plain decoding on one such core is then measured before the others. With --profile-phases the passes
of a round are also timed as programs of their own next to the whole round, which shows how a way's
time divides into drafting and verification. Times count from the first token on.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from easyspec_jax import EasySpecError, Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.cli.console import print_note
from easyspec_jax.decode.timing import alone, alternate, pass_case, round_case
from easyspec_jax.draft.layer_group import run_fuzzy
from easyspec_jax.engine.completion import Completion
from easyspec_jax.model.transformer import run_exact
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.progress import bar
from easyspec_jax.refit.__main__ import main as fit_refit
from easyspec_jax.tune.drawing import INK, dress_bars, png
from experiments.lib.machine import machine
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
from experiments.lib.processes import (
    OWN_FLAGS,
    add_process_flags,
    be_one_process,
    check_processes,
    in_processes,
)
from experiments.lib.questions import Question
from experiments.lib.tables import column, distinct, matching, speeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "experiments.table2"
ONE_DEVICE, TENSOR_PARALLEL = "one device", "TP"
TOLERANCE = {"cpu": 0.2}
"""How far phases may be off the round they make up, elsewhere 0.1: CPU cores are often shared."""


@dataclass(frozen=True)
class Way:
    """A way of decoding, and its engine."""

    name: str
    engine: Engine


def open_ways(args: argparse.Namespace) -> list[Way]:
    """Open the paper's columns; all are compared with the first.

    Raises:
        EasySpecError: As open_model.
    """
    levels, width = args.num_speculative_tokens, args.tree_width
    if args.num_processes == 1:
        return [Way(ONE_DEVICE, open_pair(args, SpeculativeConfig(method="vanilla"), mesh="1"))]
    chain = open_pair(args, SpeculativeConfig(method="sd", num_speculative_tokens=levels))
    tree = SpeculativeConfig(method="tree", num_speculative_tokens=levels, tree_width=width)
    fuzzy = SpeculativeConfig(
        num_speculative_tokens=levels, tree_width=width, lp_size=args.lp_size, refit="none"
    )
    shape = parse_mesh(args.mesh, group_size=args.lp_size)
    ways = [
        Way(TENSOR_PARALLEL, chain.baseline()),
        Way("+sd", chain),
        Way("+tree", chain.variant(tree)),
        Way(f"EasySpec, N = {args.lp_size}", chain.variant(fuzzy, shape)),
    ]
    with refit_of(args) as refit:
        if refit is not None:
            ways.append(
                Way(
                    f"EasySpec, N = {args.lp_size}, refit",
                    chain.variant(replace(fuzzy, refit=refit), shape),
                )
            )
    if chain.mesh.size == 1:
        return [Way(ONE_DEVICE, ways[0].engine), *ways[1:]]
    if args.num_processes is not None:
        return ways  # this process has one device of several
    return [Way(ONE_DEVICE, open_pair(args, SpeculativeConfig(method="vanilla"), mesh="1")), *ways]


@contextmanager
def refit_of(args: argparse.Namespace) -> Iterator[str | None]:
    """Provide the directory of the refit to draft with too, if any.

    Raises:
        EasySpecError: It cannot be fitted.
    """
    if args.fit_tokens is None:
        yield args.refit
        return
    words = [
        "--dtype",
        args.dtype,
        "--lp-size",
        f"{args.lp_size}",
        "--tokens",
        f"{args.fit_tokens}",
    ]
    for flag, value in (("--draft", args.draft), ("--platform", args.platform)):
        words += [] if value is None else [flag, value]
    words += ["--allow-links"] if args.allow_links else []
    with TemporaryDirectory() as directory:
        if fit_refit([*words, "--out", directory]):
            raise EasySpecError(f"--fit-tokens {args.fit_tokens}: no refit for this run; see above")
        yield directory


def complete(
    ways: Sequence[Way],
    questions: Sequence[Question],
    sampling: SamplingParams,
    batch_size: int = 1,
) -> dict[str, list[Completion]]:
    """Let every way complete every question's first turn; a different way begins each time."""
    chat = bool(ways[0].engine.tokenizer.chat_template)
    prompts = [question.turns[0] for question in questions]
    made: dict[str, list[Completion]] = {way.name: [] for way in ways}
    for way in ways:
        way.engine.compile(prompts, sampling, chat=chat, batch_size=batch_size)
    order = list(ways)
    with bar("Completing", len(prompts) * len(ways)) as advance:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            for way in order:
                made[way.name] += way.engine.generate(
                    batch, sampling, chat=chat, batch_size=batch_size
                )
                advance(len(batch))
            order = [*order[1:], order[0]]
    return made


def phases(engine: Engine, sampling: SamplingParams, tokens: int, repeats: int) -> dict[str, float]:
    """Return drafting, verification and both together as shares of a round timed next to them.

    Together they are not quite 1: they are programs of their own, and a round's bookkeeping is in
    neither.

    Args:
        engine: With a draft.
        sampling: How texts are sampled.
        tokens: The length of texts.
        repeats: Samples of each phase.
    """
    programs = engine.programs(sampling)
    config, (target, draft) = programs.config, engine.load()
    assert draft is not None
    where = {"context": tokens // 2, "capacity": programs.sizes.capacity(tokens)}
    of_target, of_draft = alone(engine.mesh, target), alone(engine.mesh, draft)
    nodes = 1 + (config.nodes or config.levels * config.width)
    first = run_exact if config.calibration else run_fuzzy
    cases = [
        round_case("round", programs, **where),
        pass_case("verification", of_target, nodes, run_exact, **where),
        pass_case("first", of_draft, config.pending_size, first, scored=1, **where),
        pass_case(
            "step", of_draft, config.width, run_fuzzy, loops=max(1, config.levels - 1), **where
        ),
    ]
    calls = 2  # of each case before the next
    seconds = {name: np.asarray(times) for name, times in alternate(cases, repeats, calls).items()}
    drafting = seconds["first"] + (config.levels - 1) * seconds["step"]
    verification = seconds["verification"]
    parts = {
        "drafting": drafting,
        "verification": verification,
        "together": drafting + verification,
    }
    return {name: float(np.median(part / seconds["round"])) for name, part in parts.items()}


def rows_of(
    name: str, temperature: float, made: dict[str, list[Completion]]
) -> list[dict[str, Any]]:
    """Return a row for every way: seconds for 100 tokens, the gain over the first way, acceptance.

    Deviations are over the prompts.
    """
    rows, plain = [], None
    for way, completions in made.items():
        stats = [completion.stats for completion in completions if completion.stats.decoded_tokens]
        seconds = np.array([100 * own.decode_seconds / own.decoded_tokens for own in stats])
        plain = seconds if plain is None else plain
        gains = plain / seconds if len(plain) == len(seconds) else np.full(1, np.nan)
        rounds = sum(own.rounds for own in stats)
        rates = [own.acceptance_rate for own in stats if own.drafted]
        drafted = sum(own.drafted for own in stats)
        rows.append(
            {
                "set": name,
                "temperature": temperature,
                "way": way,
                "prompts": len(stats),
                "seconds_per_100_tokens": float(seconds.mean()),
                "seconds_per_100_tokens_deviation": float(seconds.std()),
                "speedup": float(gains.mean()),
                "speedup_deviation": float(gains.std()),
                "rounds_per_100_tokens": 100 * rounds / sum(own.decoded_tokens for own in stats),
                "acceptance_rate": sum(own.accepted for own in stats) / drafted
                if drafted
                else None,
                "acceptance_rate_deviation": float(np.std(rates)) if drafted else None,
            }
        )
    return rows


def with_phases(row: dict[str, Any], shares: dict[str, float]) -> dict[str, Any]:
    """Add the seconds of drafting and verification for 100 tokens, by their shares of a round."""
    seconds = row["seconds_per_100_tokens"]
    return row | {
        "drafting": seconds * shares["drafting"],
        "verification": seconds * shares["verification"],
        "phases_over_round": shares["together"],
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all rows: temperature by temperature, set by set, way by way."""
    cache_compilations()
    questions = questions_of(args)
    ways, rows = open_ways(args), []
    drafted = [way for way in ways if way.engine.draft is not None] if args.profile_phases else []
    for temperature in args.temperatures:
        sampling = SamplingParams(temperature, seed=args.seed, max_new_tokens=args.max_new_tokens)
        for name in dict.fromkeys(question.category for question in questions):
            of_set = [question for question in questions if question.category == name]
            of_set = of_set[: args.per_set]
            rows += rows_of(name, temperature, complete(ways, of_set, sampling))
        found = {
            way.name: phases(way.engine, sampling, 2 * args.max_new_tokens, args.repeats)
            for way in drafted
        }
        rows = [
            with_phases(row, found[row["way"]])
            if row["temperature"] == temperature and row["way"] in found
            else row
            for row in rows
        ]
    return rows


def measure_processes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one core alone, then those of a process for every device.

    Gains are over one core throughout. It was measured apart, so they have no deviation.
    """
    alone = in_processes(PROGRAM, args.words, 1)
    rows = alone + in_processes(PROGRAM, args.words, args.processes)
    plain = {(row["temperature"], row["set"]): row["seconds_per_100_tokens"] for row in alone}
    return [
        row
        | {
            "speedup": plain[row["temperature"], row["set"]] / row["seconds_per_100_tokens"],
            "speedup_deviation": None,
        }
        for row in rows
    ]


def apart(rows: Sequence[dict[str, Any]], platform: str) -> list[str]:
    """Return a line for every row whose phases do not add up to its round."""
    most = TOLERANCE.get(platform, 0.1)
    last = {(row["temperature"], row["way"]): row for row in rows}
    return [
        f"{row['way']}, T = {row['temperature']:g}: phases take {row['phases_over_round']:.2f} of "
        f"the round, which is off by more than {most:.0%}; measure again where nothing else runs"
        for row in last.values()
        if abs(row.get("phases_over_round", 1) - 1) > most
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    names = (
        "T",
        "set",
        "",
        "s/100 tokens",
        "drafting",
        "verification",
        "speed-up",
        "α",
        "phases/round",
    )
    table = Table(*names, box=None, pad_edge=False)
    align_right(table.columns[3:])
    for row in rows:
        rate = row["acceptance_rate"]
        parts = [f"{row[name]:.2f}" if name in row else "" for name in ("drafting", "verification")]
        table.add_row(
            f"{row['temperature']:g}",
            row["set"],
            row["way"],
            f"{row['seconds_per_100_tokens']:.2f}",
            *parts,
            gain_of(row),
            "" if rate is None else f"{rate:.2f} ± {row['acceptance_rate_deviation']:.2f}",
            f"{row['phases_over_round']:.2f}" if "phases_over_round" in row else "",
        )
    show(table)


def gain_of(row: dict[str, Any]) -> str:
    """Write a row's gain, and its deviation if there is one."""
    deviation = row["speedup_deviation"]
    return f"{row['speedup']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


DRAFTING, VERIFICATION, WHOLE = "#0072b2", "#e69f00", "#bdbdbd"
"""From the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a bar for each way and temperature as PNG: seconds for 100 tokens.

    They are means over all sets, divided into drafting and verification where those were timed.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    temperatures = distinct(rows, "temperature")
    figure = Figure(figsize=(9, 1.4 + 2.4 * len(temperatures)), dpi=120, layout="constrained")
    figure.suptitle(f"{pair_title(measured)}, --mesh {measured['mesh']}", weight="bold", size=13)
    panels = figure.subplots(len(temperatures), 1, squeeze=False, sharex=True)[:, 0]
    for temperature, axes in zip(temperatures, panels, strict=True):
        _draw_panel(axes, matching(rows, temperature=temperature))
        axes.set_title(f"temperature {temperature:g}", size=11)
    panels[-1].set_xlabel("seconds for 100 tokens")
    handles = {
        label: bars
        for axes in panels
        for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    ways = distinct(rows, "way")
    for place, way in enumerate(ways):
        own = matching(rows, way=way)
        whole, gain = _mean(own, "seconds_per_100_tokens"), _mean(own, "speedup")
        if "drafting" in own[0]:
            drafting, verification = _mean(own, "drafting"), _mean(own, "verification")
            axes.barh(place, drafting, color=DRAFTING, height=0.62, label="drafting")
            axes.barh(
                place,
                verification,
                left=drafting,
                color=VERIFICATION,
                height=0.62,
                label="verification",
            )
            axes.plot([whole, whole], [place - 0.36, place + 0.36], color=INK, label="as it ran")
            end = max(whole, drafting + verification)
        else:
            axes.barh(place, whole, color=WHOLE, height=0.62, label="not divided")
            end = whole
        note(axes, f"{gain:.2f} ×", end, place, gap=6)
    axes.set_yticks(range(len(ways)), ways)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    dress_bars(axes)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean(column(rows, name)))


tabulate = speeds
"""Rows for the page of results."""


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it; or be one of the processes that measure.

    Raises:
        EasySpecError: --processes does not go with --mesh.
    """
    if args.process_id is not None:
        be_one_process(PROGRAM, args, measure)
        return
    check_processes(args)
    if args.per_set is not None and args.per_set < 1:
        raise EasySpecError(f"--per-set {args.per_set} must be at least 1")
    questions_of(args)  # fail here once rather than in every process
    prepare(args.out)
    rows = measure(args) if args.processes == 1 else measure_processes(args)
    print_table(rows)
    notes = apart(rows, machine(args.platform)["platform"])
    for line in notes:
        print_note(line)
    fields = settings(args, *OWN_FLAGS, "questions", "refit") | names(args) | {"notes": notes}
    publish(args.out, fields, rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--tree-width", type=int, default=4)
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    refits = parser.add_mutually_exclusive_group()
    refits.add_argument("--refit", metavar="DIR", help="also draft with the refit there")
    refits.add_argument(
        "--fit-tokens",
        type=int,
        metavar="T",
        help="also draft with a refit, fitted now to T tokens",
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument(
        "--per-set", type=int, metavar="K", help="ask only the first K questions of each set"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--profile-phases", action="store_true", help="time drafting and verification separately"
    )
    parser.add_argument("--repeats", type=int, default=15, help="samples of every phase")
    parser.add_argument(
        "--processes", type=int, default=1, help="as many as the mesh has devices, a core each"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "table2.json")
    add_process_flags(parser, argv)
    return run_experiment(PROGRAM, parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
