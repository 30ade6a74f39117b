"""Measure what a grammar costs: `python -m experiments.grammar [--target DIR --draft DIR]`.

Prompts ask for short JSON of five schemas. Plain decoding and drafts complete each with its schema
as the grammar, and some again without one, alternating prompt by prompt. Texts with a grammar must
be valid, and the same with and without drafts. A text without one has as many tokens at most.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jsonschema import ValidationError, validate
from rich.table import Table

from easyspec_jax import Completion, EasySpecError, Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
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
from experiments.lib.pair import add_flags, names, open_pair
from experiments.lib.tables import Rows

PLAIN, DRAFTED = "plain", "speculative"
FREE = " without a grammar"


def _object(**properties: Any) -> dict[str, Any]:
    fields = {"properties": properties, "required": list(properties)}
    # At most a blank between tokens of JSON: a line break with a long indent would use up the text.
    blanks = {"x-guidance": {"whitespace_pattern": " ?"}}
    return {"type": "object", **fields, "additionalProperties": False, **blanks}


def _word(length: int = 16) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": length, "pattern": "^[A-Za-z ]+$"}


_YEAR = {"type": "integer", "minimum": 1000, "maximum": 2100}

FORMS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    (
        "Describe the country {} as JSON with its capital, continent, and whether it has a coast.",
        _object(capital=_word(), continent=_word(), coast={"type": "boolean"}),
        (
            "France",
            "Japan",
            "Egypt",
            "Brazil",
            "Nepal",
            "Kenya",
            "Chile",
            "Norway",
            "India",
            "Mali",
        ),
    ),
    (
        "Describe the element {} as JSON with its symbol, atomic number and state.",
        _object(
            symbol={"type": "string", "pattern": "^[A-Z][a-z]?$"},
            number={"type": "integer", "minimum": 1, "maximum": 118},
            state={"enum": ["solid", "liquid", "gas"]},
        ),
        ("iron", "helium", "gold", "mercury", "neon", "sodium", "tin", "argon", "zinc", "carbon"),
    ),
    (
        "Describe the book {} as JSON with its author and year.",
        _object(author=_word(24), year=_YEAR),
        (
            *("Dracula", "Emma", "Ulysses", "Dune", "Walden", "Frankenstein", "Hamlet", "Candide"),
            *("Moby-Dick", "Jane Eyre"),
        ),
    ),
    (
        "Rate this review as JSON with a mood, stars and up to two tags: “{}”",
        _object(
            mood={"enum": ["positive", "neutral", "negative"]},
            stars={"type": "integer", "minimum": 1, "maximum": 5},
            tags={"type": "array", "items": _word(10), "maxItems": 2},
        ),
        (
            *("Great food!", "It broke at once.", "Fine for the price.", "Never again."),
            *("My kids love it.", "Slow, but friendly.", "The best hotel in town.", "Too loud."),
            *("It does what it says.", "A waste of money."),
        ),
    ),
    (
        "Describe the programming language {} as JSON with its typing, year and file extension.",
        _object(
            typing={"enum": ["static", "dynamic"]},
            year=_YEAR,
            extension={"type": "string", "pattern": "^\\.[a-z]{1,4}$"},
        ),
        ("Python", "Rust", "Java", "Go", "Ruby", "Haskell", "C", "Lua", "Kotlin", "Swift"),
    ),
)
"""Questions, their schemas, and ten subjects for each."""


@dataclass(frozen=True)
class Task:
    """A prompt and the schema of its answer."""

    prompt: str
    schema: dict[str, Any]


def tasks(number: int) -> list[Task]:
    """Return the first of all tasks; schemas take turns."""
    subjects = zip(*(subjects for _, _, subjects in FORMS), strict=True)
    found = [
        Task(question.format(subject), schema)
        for round_ in subjects
        for (question, schema, _), subject in zip(FORMS, round_, strict=True)
    ]
    return found[:number]


class Stopwatch:
    """Sums the seconds of all that the host is asked, by each device."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, answer: Callable[..., Any]) -> Any:
        """Wrap what answers."""

        def wrapped(*args: Any) -> Any:
            begun = time.perf_counter()
            found = answer(*args)
            self.seconds += time.perf_counter() - begun
            return found

        return wrapped


@dataclass(frozen=True)
class Timed:
    """A completion, and the seconds of its masks on the host."""

    completion: Completion
    masks: float


def measure(
    engines: Mapping[str, Engine], asked: Sequence[Task], free: int, limit: int
) -> dict[str, list[Timed]]:
    """Complete all tasks in every way, and the first ones without a grammar too, alternating."""
    watches = {name: Stopwatch() for name in engines}
    for name, engine in engines.items():
        watch = watches[name]
        engine.grammars.masks = watch.timed(engine.grammars.masks)
        engine.grammars.forced = watch.timed(engine.grammars.forced)
    chat = bool(engines[PLAIN].tokenizer.chat_template)
    made: dict[str, list[Timed]] = {name + end: [] for end in ("", FREE) for name in engines}

    def complete(name: str, task: Task, sampling: SamplingParams) -> Timed:
        before = watches[name].seconds
        (completion,) = engines[name].generate([task.prompt], sampling, chat=chat)
        return Timed(completion, watches[name].seconds - before)

    order = list(engines)
    for name in order:
        _warm_up(engines[name], asked, limit, chat, free > 0)
    with bar("Completing", len(asked)) as advance:
        for number, task in enumerate(asked):
            sampling = SamplingParams(json_schema=task.schema, max_new_tokens=limit)
            for name in order:
                made[name].append(complete(name, task, sampling))
            length = len(made[order[0]][-1].completion.token_ids)
            for name in order if number < free else ():
                # The same programs as for other lengths.
                made[name + FREE].append(
                    complete(name, task, SamplingParams(max_new_tokens=length))
                )
            order = [*order[1:], order[0]]
            advance(1)
    return {name: own for name, own in made.items() if own}


def _warm_up(engine: Engine, asked: Sequence[Task], limit: int, chat: bool, free: bool) -> None:
    """Compile, and let the host compile each grammar."""
    prompts = [task.prompt for task in asked]
    for task in asked[: len(FORMS)]:
        sampling = SamplingParams(json_schema=task.schema, max_new_tokens=limit)
        engine.compile(prompts, sampling, chat=chat)
    if free:
        engine.compile(prompts, SamplingParams(max_new_tokens=limit), chat=chat)


def is_valid(task: Task, completion: Completion) -> bool:
    """Return whether a text is JSON of the task's schema."""
    try:
        validate(json.loads(completion.text), task.schema)
    except (ValueError, ValidationError):
        return False
    return True


def rows_of(made: Mapping[str, Sequence[Timed]], asked: Sequence[Task]) -> list[dict[str, Any]]:
    """Return a row for each way.

    `seconds_a_round` and `masks_a_round` are medians over the prompts; `over_free` is the median of
    a round's seconds over those of the same prompt without a grammar.
    """
    rows = []
    for name, own in made.items():
        texts = [one.completion for one in own]
        free = made.get(name + FREE, ())
        plain = [one.completion.token_ids for one in made[PLAIN]]
        stats = sum((one.stats for one in texts[1:]), texts[0].stats)
        rows.append(
            {
                "way": name,
                "prompts": len(own),
                "valid": sum(map(is_valid, asked, texts)),
                "same_tokens": None
                if name.endswith(FREE)
                else sum(a.token_ids == b for a, b in zip(texts, plain, strict=True)),
                "tokens": sum(len(one.token_ids) for one in texts),
                "tokens_per_second": stats.tokens_per_second,
                "acceptance_rate": stats.acceptance_rate,
                "tokens_a_round": stats.mean_acceptance_length,
                "forced": stats.forced,
                "seconds_a_round": median(map(_round, own)),
                "masks_a_round": median(one.masks / one.completion.stats.rounds for one in own),
                "over_free": median(_round(a) / _round(b) for a, b in zip(own, free, strict=False))
                if free
                else None,
            }
        )
    return rows


def _round(one: Timed) -> float:
    return one.completion.stats.decode_seconds / one.completion.stats.rounds


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate validity, equality, speed, and what the masks take of a round."""

    def number(value: float | None, scale: float = 1, digits: int = 2) -> str:
        return "" if value is None else f"{scale * value:.{digits}f}"

    return [
        {
            "": row["way"],
            "valid": f"{row['valid']} of {row['prompts']}",
            "same as plain": "" if row["same_tokens"] is None else row["same_tokens"],
            "tokens/s": number(row["tokens_per_second"]),
            "α": number(row["acceptance_rate"]),
            "tokens a round": number(row["tokens_a_round"]),
            "forced": row["forced"],
            "ms a round": number(row["seconds_a_round"], 1000, 1),
            "of which masks": number(row["masks_a_round"], 1000, 1),
            "over a round without": number(row["over_free"]),
        }
        for row in measured["results"]
    ]


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON."""
    most = sum(len(subjects) for _, _, subjects in FORMS)
    if not 1 <= args.prompts <= most:
        raise EasySpecError(f"--prompts {args.prompts} must be from 1 to {most}")
    check_destination(args.out)
    cache_compilations()
    asked = tasks(args.prompts)
    speculative = SpeculativeConfig(
        method=args.method, num_speculative_tokens=args.num_speculative_tokens, verifier="coupled"
    )
    drafted = open_pair(args, speculative)
    engines = {PLAIN: drafted.baseline(), DRAFTED: drafted}
    rows = rows_of(measure(engines, asked, args.free, args.max_new_tokens), asked)
    table = Table(*tabulate({"results": rows})[0], box=None, pad_edge=False)
    align_right(table.columns[1:])
    for row in tabulate({"results": rows}):
        table.add_row(*map(str, row.values()))
    show(table)
    platform: str = drafted.mesh.devices.flat[0].platform
    fields = settings(args, "questions", "target", "draft") | names(args)
    fields |= {"platform": platform, "dtype": drafted.dtype, "machine": machine(platform)}
    save(args.out, as_json(fields | {"results": rows}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.grammar", description=__doc__)
    add_flags(parser)
    parser.add_argument("--method", choices=("sd", "easyspec", "tree"), default="sd")
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--prompts", type=int, default=50, help="how many to complete")
    parser.add_argument(
        "--free", type=int, default=10, help="how many to complete without a grammar, too"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "grammar.json")
    return run_experiment("experiments.grammar", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
