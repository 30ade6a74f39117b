"""Compare with other engines in one run: `python -m experiments.peers [--target DIR --draft DIR]`.

transformers, llama.cpp (`pip install llama-cpp-python`) and vLLM, where installed, complete the
same prompts with the same weights, greedily. They alternate with this package prompt by prompt,
because a shared machine drifts. A time is that of a whole completion including its prompt, and
every engine has a thread for each core. Texts are compared token by token with our plain decoding.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import jax
from rich.table import Table

from easyspec_jax import EasySpecError, Engine, SamplingParams, SpeculativeConfig, demo
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.progress import bar
from easyspec_jax.tune.drawing import INK, SOFT, WHITE, dress_bars, png
from experiments.lib.divergence import NextLogits, divergence, first_difference, next_logits
from experiments.lib.machine import cores
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
from experiments.lib.tables import Rows, column
from experiments.ours.peer_engines import ENGINES, EXACT, Complete, Peer, Task, open_peers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "plain"


@dataclass(frozen=True)
class Measured:
    """The figures of one way of decoding.

    Attributes:
        seconds: Of each prompt, repeat by repeat.
        texts: The ids by prompt, as they came out the last time.
    """

    seconds: list[list[float]] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)

    def speeds(self) -> list[float]:
        """Return tokens a second over all prompts, repeat by repeat."""
        tokens = sum(map(len, self.texts.values()))
        return [tokens / sum(seconds) for seconds in self.seconds]


def alternate(
    ways: Mapping[str, Complete],
    prompts: Sequence[Sequence[int]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured]:
    """Let every way complete every prompt `repeats` times, alternating prompt by prompt.

    A different way begins each time. Before, each completes the first prompt once, untimed.
    """
    measured = {name: Measured() for name in ways}
    order = list(ways)
    with bar("Completing", (repeats * len(prompts) + 1) * len(ways)) as advance:
        for complete in ways.values():
            complete(prompts[0])
            advance(1)
        for _ in range(repeats):
            for own in measured.values():
                own.seconds.append([])
            for number, prompt in enumerate(prompts):
                for name in order:
                    begun = clock()
                    measured[name].texts[number] = ways[name](prompt)
                    measured[name].seconds[-1].append(clock() - begun)
                    advance(1)
                order = [*order[1:], order[0]]
    return measured


def rows_of(
    measured: Mapping[str, Measured], prompts: Sequence[Sequence[int]], behind: NextLogits
) -> list[dict[str, Any]]:
    """Return a row for every way; ratios are to the first way, repeat by repeat.

    `identical` is the share of the first way's tokens before the texts part. `divergences` are the
    places where they do, with the gap between the target's logits of the two tokens, or None where
    one text only ends sooner.
    """
    plain = next(iter(measured.values()))
    rows = []
    for name, own in measured.items():
        texts = [own.texts[number] for number in range(len(prompts))]
        figures = _speeds(own, plain) | _compared(texts, plain, prompts, behind)
        rows.append({"name": name} | figures)
    return rows


def _speeds(own: Measured, plain: Measured) -> dict[str, Any]:
    speed, other = own.speeds(), plain.speeds()
    return {
        "tokens_per_second": speed,
        "over_plain": [a / b for a, b in zip(speed, other, strict=True)],
    }


def _compared(
    texts: Sequence[Sequence[int]],
    plain: Measured,
    prompts: Sequence[Sequence[int]],
    behind: NextLogits,
) -> dict[str, Any]:
    shared, places = 0, []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        expected = plain.texts[number]
        place = first_difference(expected, text)
        shared += len(expected) if place is None else place
        found = divergence(behind, prompt, expected, text)
        if found is not None:
            gap = None if math.isnan(found.logit_gap) else found.logit_gap
            places.append({"prompt": number} | asdict(found) | {"logit_gap": gap})
    return {"identical": shared / sum(map(len, plain.texts.values())), "divergences": places}


def ours(
    engine: Engine, prompts: Mapping[tuple[int, ...], str], sampling: SamplingParams, chat: bool
) -> Complete:
    """Compile decoding by this package and return it, from prompt ids by way of the text."""
    engine.compile(list(prompts.values()), sampling, chat=chat)
    return lambda ids: next(engine.generate([prompts[tuple(ids)]], sampling, chat=chat)).token_ids


def open_ours(args: argparse.Namespace) -> dict[str, Engine]:
    """Open this package's ways, plain decoding first.

    Raises:
        EasySpecError: As open_model.
    """
    levels = args.num_speculative_tokens
    chain = open_pair(args, SpeculativeConfig(method="sd", num_speculative_tokens=levels))
    fuzzy = SpeculativeConfig(num_speculative_tokens=levels, lp_size=args.lp_size)
    grouped = chain.variant(fuzzy)
    name = f"easyspec, N = {args.lp_size}" + (", refit" if grouped.refit is not None else "")
    return {PLAIN: chain.baseline(), "sd": chain, name: grouped}


def measure(
    args: argparse.Namespace, directory: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return all rows, those of missing engines included, and the settings."""
    questions = questions_of(args)
    engines = open_ours(args)
    plain = engines[PLAIN]
    chat = bool(plain.tokenizer.chat_template)
    texts = [question.turns[0] for question in questions]
    prompts = {tuple(plain.encode(text, chat)): text for text in texts}
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    platform: str = plain.mesh.devices.flat[0].platform
    task = Task(
        target=Path(args.target or demo.TARGET),
        draft=Path(args.draft or demo.DRAFT),
        directory=directory,
        platform=platform,
        dtype=plain.dtype,
        stop_ids=plain.target.config.stop_ids,
        num_speculative_tokens=args.num_speculative_tokens,
        max_new_tokens=args.max_new_tokens,
        length=max(map(len, prompts)) + args.max_new_tokens,
        gguf=args.gguf,
        gguf_draft=args.gguf_draft,
        allow_links=args.allow_links,
    )
    peers, missing = open_peers(task, {name: ENGINES[name] for name in args.engines})
    own = {
        name: Peer(ours(engine, prompts, sampling, chat), f"jax {jax.__version__}")
        for name, engine in engines.items()
    }
    ways = own | peers
    measured = alternate(
        {name: way.complete for name, way in ways.items()}, list(prompts), args.repeats
    )
    rows = rows_of(measured, list(prompts), next_logits(plain))
    rows = [
        row | {"version": ways[row["name"]].version, "weights": ways[row["name"]].weights}
        for row in rows
    ]
    settings = {
        "platform": platform,
        "dtype": plain.dtype,
        "threads": cores(),
        "prompts": len(prompts),
        "chat": chat,
    }
    return [
        *rows,
        *({"name": name, "missing": reason} for name, reason in missing.items()),
    ], settings


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(
        "",
        "tokens/s",
        "over plain",
        "identical",
        "largest logit gap",
        "weights",
        box=None,
        pad_edge=False,
    )
    align_right(table.columns[1:-1])
    for row in rows:
        if "missing" in row:
            table.add_row(row["name"], row["missing"])
            continue
        gap = max((place["logit_gap"] or 0.0 for place in row["divergences"]), default=None)
        table.add_row(
            row["name"],
            f"{median(row['tokens_per_second']):.1f}",
            f"{median(row['over_plain']):.2f}",
            f"{row['identical']:.1%}",
            "" if gap is None else f"{gap:.2g}",
            "" if row["weights"] == EXACT else row["weights"],
        )
    show(table)


OURS, THEIRS = "#0072b2", "#e69f00"
"""From the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw a bar for each way as PNG: its speed over plain decoding, median and range.

    The text behind a bar says how much of its texts is identical.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in measured["results"] if "missing" not in row]
    missing = [
        f"{row['name']}: {row['missing']}" for row in measured["results"] if "missing" in row
    ]
    figure = Figure(figsize=(9, 1.9 + 0.42 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(pair_title(measured), weight="bold", size=13)
    axes: Any = figure.subplots()
    for place, row in enumerate(rows):
        ratios = row["over_plain"]
        middle = median(ratios)
        spread = [[middle - min(ratios)], [max(ratios) - middle]]
        axes.barh(place, middle, height=0.62, color=THEIRS if _foreign(row["name"]) else OURS)
        axes.errorbar([middle], [place], xerr=spread, color=INK, capsize=3, linewidth=1)
        text = f"{middle:.2f} ×, {row['identical']:.0%} identical"
        box = {"facecolor": WHITE, "edgecolor": "none", "pad": 1}  # over the line at 1
        note(axes, text, max(ratios), place, gap=7, bbox=box)
    axes.axvline(1, color=SOFT, linestyle=(0, (4, 2)), linewidth=1)
    axes.set_yticks(range(len(rows)), column(rows, "name"))
    axes.invert_yaxis()
    fastest = max(max(row["over_plain"]) for row in rows)
    axes.set_xlim(0, 1.35 * fastest)  # leaves room for the text behind the bars
    axes.set_xlabel(
        "tokens/s over those of our plain decoding" + "".join(f"\n{line}" for line in missing)
    )
    axes.set_title(
        f"{measured['platform']}, {measured['dtype']}, {measured['threads']} threads", size=11
    )
    dress_bars(axes)
    handles = [Patch(color=OURS, label="this package"), Patch(color=THEIRS, label="other engines")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _foreign(name: str) -> bool:
    return name.startswith(("transformers", "llama.cpp", "vLLM"))


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate the engines; speeds are medians over the repeats."""
    table = []
    for row in measured["results"]:
        if "missing" in row:
            table.append({"engine": row["name"], "weights": f"not measured: {row['missing']}"})
            continue
        gaps = [
            place["logit_gap"] for place in row["divergences"] if place["logit_gap"] is not None
        ]
        table.append(
            {
                "engine": row["name"],
                "tokens/s": median(row["tokens_per_second"]),
                "over plain": median(row["over_plain"]),
                "identical": f"{row['identical']:.1%}",
                "largest logit gap": max(gaps, default=None),
                "weights": row["weights"],
                "version": row["version"],
            }
        )
    names = list(dict.fromkeys(name for row in table for name in row if name != "weights"))
    return [{name: row.get(name) for name in [*names, "weights"]} for row in table]


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the JSON and draw it."""
    if args.repeats < 1:
        raise EasySpecError(f"--repeats {args.repeats} must be at least 1")
    for flag, role, path in (
        ("--gguf", "target", args.gguf),
        ("--gguf-draft", "draft", args.gguf_draft),
    ):
        if path is not None and not path.is_file():
            raise EasySpecError(
                f"{flag} {path} is not a file; leave it out, or give a GGUF file of the {role}"
            )
    if args.gguf_draft is not None and args.gguf is None:
        raise EasySpecError("--gguf-draft drafts for the file of --gguf; give that too")
    prepare(args.out)
    cache_compilations()
    with tempfile.TemporaryDirectory() as directory:
        rows, measured = measure(args, Path(directory))
    print_table(rows)
    fields = (
        settings(args, "questions", "target", "draft", "gguf", "gguf_draft")
        | measured
        | names(args)
    )
    publish(args.out, fields, rows, draw)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.peers", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--gguf",
        type=Path,
        help="also time llama.cpp on this file of the target, which may be quantized",
    )
    parser.add_argument(
        "--gguf-draft", type=Path, help="a file of the draft, to draft for that of --gguf"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=list(ENGINES),
        default=list(ENGINES),
        help="only these next to ours: each of them keeps the pair in memory once more; gguf is "
        "llama.cpp on the files of --gguf and --gguf-draft",
    )
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    return run_experiment("experiments.peers", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
