"""Time the first token of a second turn: `python -m experiments.second_turn --tokens 1000`.

A conversation of some tokens, its answer included, gets one second question after another. Each is
answered twice: with the store of prefixes, which has the first turn, and without, which prefills
all of it again. The two alternate in their order, too. Nothing is compiled in the time that counts.
Questions take the temperatures one after another. The verifier is the coupled one, so that one seed
is one text at any temperature.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from easyspec_jax import Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations, read_prompts
from easyspec_jax.cli.flags import add_shared
from easyspec_jax.engine.completion import Completion, EncodedPrompt
from easyspec_jax.progress import bar
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
from experiments.lib.pair import DATA, add_models, names, open_pair
from experiments.lib.tables import Rows

STORE = 512 << 20
"""Bytes of the store of prefixes, as in conversations."""


def first_turn(engine: Engine, tokens: int) -> str:
    """Return a text of about as many tokens: lines of prompts, over and over."""
    text = ""
    for line in itertools.cycle(read_prompts(DATA / "refit_prompts.txt")):
        if len(engine.encode(text + line)) >= tokens:
            return text
        text += line + "\n"
    raise AssertionError("there are no lines")


def second_turns(
    engine: Engine, first: str, answer: str, questions: Sequence[str]
) -> list[EncodedPrompt]:
    """Return the second turn of a conversation, once for each question."""
    prompts: list[Any] = [f"{first}{answer}\n{question}\n" for question in questions]
    if engine.tokenizer.chat_template:
        said = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
        prompts = [[*said, {"role": "user", "content": question}] for question in questions]
    return engine.prepare(prompts)


def complete(
    engine: Engine, row: EncodedPrompt, sampling: SamplingParams
) -> tuple[Completion, float]:
    """Complete a prompt with everything compiled before; return the seconds to its first token."""
    engine.compile([row], sampling)
    times: list[float] = []
    begun = time.perf_counter()

    # Called once for each token or round, also where no whole character is there yet.
    def note(piece: str) -> None:
        times.append(time.perf_counter() - begun)

    return next(engine.generate([row], sampling, on_text=note)), times[0]


def measure(
    engine: Engine,
    tokens: int,
    sampling: SamplingParams,
    repeats: int,
    temperatures: Sequence[float] = (0.0,),
) -> list[dict[str, Any]]:
    """Answer second questions with and without the store, in alternating order.

    Args:
        engine: A pair with a store of prefixes.
        tokens: Tokens of the conversation before the second question.
        sampling: How all answers are sampled, but for the temperature; the first one is greedy.
        repeats: How many second questions for each temperature.
        temperatures: Those of the second answers.

    Returns:
        A row for each: seconds to the first token, cached tokens, and whether the tokens agree.
    """
    first = first_turn(engine, tokens - sampling.max_new_tokens)
    chat = bool(engine.tokenizer.chat_template)
    (row,) = engine.prepare([first], chat=chat)
    answer = complete(engine, row, sampling)[0].text
    # Of a question that is asked again, the store would have everything.
    count = len(temperatures) * (repeats + 1)
    questions = read_prompts(DATA / "refit_prompts.txt")[-count:]
    turns = second_turns(engine, first, answer, questions)
    found = []
    with bar("Answering", len(turns)) as advance:
        for number, turn in enumerate(turns):
            repeat, place = divmod(number, len(temperatures))
            asked = replace(sampling, temperature=temperatures[place], seed=number)
            completions = {}
            for size in (STORE, 0) if repeat % 2 else (0, STORE):
                engine.prefix_cache = size
                completions[size] = complete(engine, turn, asked)
            (cached, cached_seconds), (whole, whole_seconds) = completions[STORE], completions[0]
            found.append(
                {
                    "temperature": asked.temperature,
                    "tokens": len(turn.ids),
                    "cached_tokens": cached.stats.cached_tokens,
                    "cached_seconds": cached_seconds,
                    "whole_seconds": whole_seconds,
                    "same_tokens": cached.token_ids == whole.token_ids,
                }
            )
            advance(1)
    return found[len(temperatures) :]  # the first questions warm up


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians by temperature; the share is a median over pairs of the same question."""
    rows = measured["results"]
    by_temperature: dict[float, list[Any]] = {}
    for row in rows:
        by_temperature.setdefault(row.get("temperature", 0.0), []).append(row)
    return [
        _medians(measured["mesh"], temperature, found)
        for temperature, found in by_temperature.items()
    ]


def _medians(mesh: str, temperature: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shares = [row["cached_seconds"] / row["whole_seconds"] for row in rows]
    return {
        "mesh": mesh,
        "temperature": f"{temperature:g}",
        "tokens": int(median(row["tokens"] for row in rows)),
        "of them cached": int(median(row["cached_tokens"] for row in rows)),
        "ms to the first token": 1e3 * median(row["cached_seconds"] for row in rows),
        "ms without the store": 1e3 * median(row["whole_seconds"] for row in rows),
        "share": f"{median(shares):.3f}",
        "same tokens": f"{sum(row['same_tokens'] for row in rows)} of {len(rows)}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.second_turn", description=__doc__)
    add_models(parser)
    add_shared(parser, "--mesh", "--platform", "--dtype")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10, help="of each temperature")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--out", type=Path, default=RESULTS / "second_turn.json")
    return run_experiment("experiments.second_turn", parser, report, argv)


def report(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON."""
    check_destination(args.out)
    cache_compilations()
    engine = open_pair(args, SpeculativeConfig(verifier="coupled"), prefix_cache=STORE)
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    rows = measure(engine, args.tokens, sampling, args.repeats, args.temperatures)
    measured = settings(args) | names(args) | {"machine": machine(args.platform), "results": rows}
    shown = tabulate(measured)
    table = Table(*shown[0])
    align_right(table.columns)
    for row in shown:
        table.add_row(*(f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()))
    show(table)
    save(args.out, as_json(measured))


if __name__ == "__main__":
    sys.exit(main())
