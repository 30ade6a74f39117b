"""Answer Spec-Bench's questions, or ours, as in Table 3: `python -m experiments.spec_bench`.

Every question is answered greedily by speculation and by plain decoding. The table has the gain in
every category, and says where answers part and how near a tie that was. --answers FILE keeps them
in Spec-Bench's own format for its scripts.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from easyspec_jax import EasySpecError, Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
from easyspec_jax.decode.stats import Stats
from easyspec_jax.files import check_writable, write_whole
from easyspec_jax.options import Method
from easyspec_jax.progress import bar
from easyspec_jax.tokenizer.conversation import Prompt
from easyspec_jax.tune.drawing import INK, dress_bars, png
from experiments.lib.divergence import Divergence, divergence, next_logits
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
from experiments.lib.questions import Answer, Question
from experiments.lib.tables import Rows, column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERALL = "overall"

Pair = tuple[Answer, Answer]
"""The same question by speculation and by plain decoding."""


def answer(engine: Engine, question: Question, sampling: SamplingParams) -> Answer:
    """Answer turn by turn, each with all before it.

    The turns are a conversation, or one text where there is no chat template.
    """
    turns, seconds = [], []
    prompt: Prompt = [] if engine.tokenizer.chat_template else ""
    for said in question.turns:
        prompt = (
            prompt + said
            if isinstance(prompt, str)
            else [*prompt, {"role": "user", "content": said}]
        )
        begun = time.perf_counter()
        turns.append(next(engine.generate([prompt], sampling)))
        seconds.append(time.perf_counter() - begun)
        text = turns[-1].text
        prompt = (
            prompt + text
            if isinstance(prompt, str)
            else [*prompt, {"role": "assistant", "content": text}]
        )
    return Answer(question, tuple(turns), tuple(seconds))


def answer_all(
    engine: Engine, plain: Engine, questions: Sequence[Question], sampling: SamplingParams
) -> list[Pair]:
    """Answer question by question with both, each once untimed to compile its programs."""
    pairs = []
    with bar("Answering", len(questions)) as advance:
        for question in questions:
            for own in (engine, plain):
                answer(own, question, sampling)
            pairs.append((answer(engine, question, sampling), answer(plain, question, sampling)))
            advance(1)
    return pairs


def divergences(plain: Engine, pairs: Sequence[Pair]) -> list[Divergence | None]:
    """Find where the first differing turn of each question parts.

    Later turns were asked something else.
    """
    found, behind = [], next_logits(plain)
    for ours, theirs in pairs:
        places = (
            divergence(behind, b.prompt_ids, a.token_ids, b.token_ids)
            for a, b in zip(ours.turns, theirs.turns, strict=True)
        )
        found.append(next((place for place in places if place is not None), None))
    return found


def summary(
    category: str, pairs: Sequence[Pair], parted: Sequence[Divergence | None]
) -> dict[str, Any]:
    """Return one row of the table.

    Speeds are means over questions of tokens by wall time, as in Spec-Bench.
    """
    ours, plain = (np.array([_speed(answer) for answer in own]) for own in zip(*pairs, strict=True))
    stats = reduce(Stats.__add__, (turn.stats for ours, _ in pairs for turn in ours.turns))
    gaps = [place.logit_gap for place in parted if place is not None]
    return {
        "category": category,
        "questions": len(pairs),
        "tokens_per_second": float(ours.mean()),
        "plain_tokens_per_second": float(plain.mean()),
        "speedup": float(ours.mean() / plain.mean()),
        "speedup_deviation": float(np.std(ours / plain)),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "same": len(pairs) - len(gaps),
        "largest_logit_gap": max(gaps, default=None),
    }


def _speed(answer: Answer) -> float:
    return sum(len(turn.token_ids) for turn in answer.turns) / sum(answer.seconds)


def summaries(pairs: Sequence[Pair], parted: Sequence[Divergence | None]) -> list[dict[str, Any]]:
    """Return a row for each category, in order, and one for all of them."""
    rows = []
    for category in dict.fromkeys(ours.question.category for ours, _ in pairs):
        own = [place for place, (ours, _) in enumerate(pairs) if ours.question.category == category]
        rows.append(
            summary(category, [pairs[place] for place in own], [parted[place] for place in own])
        )
    return [*rows, summary(OVERALL, pairs, parted)]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(
        "category", "tokens/s", "plain", "speed-up", "tokens a round", "same answers", box=None
    )
    align_right(table.columns[1:])
    for row in rows:
        gap = row["largest_logit_gap"]
        same = f"{row['same']} of {row['questions']}" + ("" if gap is None else f", gap {gap:.2g}")
        table.add_row(
            row["category"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['plain_tokens_per_second']:.1f}",
            f"{row['speedup']:.2f} ± {row['speedup_deviation']:.2f}",
            f"{row['mean_acceptance_length']:.2f}",
            same,
        )
    show(table)


SPEED, LENGTH = "#0072b2", "#e69f00"
"""From the palette of Okabe and Ito, far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """Draw speed and tokens a round by category as PNG.

    Raises:
        EasySpecError: matplotlib is missing.
    """
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    figure = Figure(figsize=(9, 1.8 + 0.36 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(f"{pair_title(measured)}, --mesh {measured['mesh']}", weight="bold", size=13)
    speed, length = figure.subplots(1, 2, sharey=True)
    panels = (
        (
            speed,
            "speed over plain decoding",
            "speedup",
            SPEED,
            column(rows, "speedup_deviation"),
        ),
        (length, "tokens a round", "mean_acceptance_length", LENGTH, None),
    )
    for axes, label, name, color, deviations in panels:
        values = [row[name] for row in rows]
        axes.barh(
            range(len(rows)),
            values,
            xerr=deviations,
            color=color,
            height=0.62,
            ecolor=INK,
            capsize=3,
        )
        for place, value in enumerate(values):
            end = value + (deviations[place] if deviations else 0)
            note(axes, f"{value:.2f}", end, place)
        axes.set_xlabel(label)
        axes.margins(x=0.16)
        dress_bars(axes)
        axes.set_yticks(
            range(len(rows)), [f"{row['category']}\n{row['questions']} questions" for row in rows]
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)
    speed.axvline(1, color=INK, linewidth=1, linestyle=":")
    return figure


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate every category."""
    return [
        {
            "category": row["category"],
            "questions": row["questions"],
            "tokens/s": row["tokens_per_second"],
            "over plain": f"{row['speedup']:.2f} ± {row['speedup_deviation']:.2f}",
            "tokens a round": row["mean_acceptance_length"],
            "α": row["acceptance_rate"],
            "same answers": row["same"],
            "largest logit gap": row["largest_logit_gap"],
        }
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> None:
    """Answer, print the table, write the JSON, draw it, and keep the answers if asked to."""
    cache_compilations()
    questions = questions_of(args)
    prepare(args.out)
    files = _answer_files(args.answers)
    engine = open_pair(args, _chosen(args))
    plain = engine.baseline()
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    pairs = answer_all(engine, plain, questions, sampling)
    rows = summaries(pairs, divergences(plain, pairs))
    called = names(args)
    for way, (path, label) in enumerate(zip(files, (args.method, "vanilla"), strict=False)):
        lines = (
            json.dumps(pair[way].as_dict(f"{called['target']}-{label}", time.time()))
            for pair in pairs
        )
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    print_table(rows)
    fields = settings(args, "questions", "answers") | called | {"refit": engine.refit is not None}
    publish(args.out, fields, rows, draw)


def _answer_files(answers: Path | None) -> list[Path]:
    """Return the files for the answers of speculation and of plain decoding."""
    if answers is None:
        return []
    if answers.suffix != ".jsonl" or not answers.parent.is_dir():
        raise EasySpecError(f"--answers {answers} must be a .jsonl file in a directory that exists")
    files = [answers, answers.with_name(f"{answers.stem}-plain.jsonl")]
    for path in files:
        check_writable(path)
    return files


def _chosen(args: argparse.Namespace) -> SpeculativeConfig:
    return SpeculativeConfig(
        method=args.method,
        num_speculative_tokens=args.num_speculative_tokens,
        tree_width=args.tree_width,
        lp_size=args.lp_size,
        refit=args.refit,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.spec_bench", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--method", choices=[m for m in Method.__args__ if m != "vanilla"], default=default.method
    )
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--tree-width", type=int)
    parser.add_argument("--lp-size", type=int, default=default.lp_size)
    parser.add_argument(
        "--refit",
        default=default.refit,
        help='"auto", "none" or a directory (default: %(default)s)',
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="keep the answers as JSON lines; plain decoding's go to …-plain.jsonl",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "spec_bench.json")
    return run_experiment("experiments.spec_bench", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
