"""Measure drafts that are looked up: `python -m experiments.lookup [--target DIR --draft DIR]`.

Prompts whose answers repeat them (code to edit, JSON to extract) and prompts whose answers do not
are completed plainly, by lookups alone, and by a draft without and with lookups, alternating prompt
by prompt. On the plain texts, several ways to find the draft are then compared without a model.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from rich.table import Table

from easyspec_jax import EasySpecError, Engine, SamplingParams, SpeculativeConfig
from easyspec_jax.cli.command import Parser, cache_compilations
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
from experiments.lib.pair import DATA, add_flags, names, open_pair
from experiments.lib.questions import Question, read_questions
from experiments.lib.tables import Rows
from experiments.ours.peers import PLAIN, Measured, alternate, ours


class Finder(Protocol):
    """A way to find what followed the last tokens of a text where they stood before."""

    def push(self, token: int) -> None:
        """Take the text's next token."""
        ...

    def continuation(self, levels: int) -> list[int]:
        """Return what is drafted after the text so far; nothing if nothing matches."""
        ...


class Ngrams:
    """The last n tokens, the longest n first; of its places, the latest."""

    def __init__(self, longest: int, shortest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def push(self, token: int) -> None:
        """Note where every n-gram that ends here begins to go on."""
        # Those that end with the token before: only now does something follow them.
        for size in self._sizes:
            if len(self._text) >= size:
                self._ends[tuple(self._text[-size:])] = len(self._text)
        self._text.append(token)

    def continuation(self, levels: int) -> list[int]:
        """Look up the n-grams at the end, the longest first."""
        for size in self._sizes:
            place = self._ends.get(tuple(self._text[-size:]))
            if len(self._text) >= size and place is not None:
                return periodic(self._text, place, levels)
        return []


class SuffixAutomaton:
    """The longest suffix that stood before, however long (Blumer et al. 1985); its latest place."""

    def __init__(self, shortest: int) -> None:
        self._shortest = shortest
        self._text: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._latest = [-1], [0], [0]
        self._last = 0

    def push(self, token: int) -> None:
        """Extend the automaton by a token."""
        # The suffixes that stood before ended somewhere else; now they also end here.
        state = self._last
        while state > 0:
            self._latest[state] = len(self._text)
            state = self._link[state]
        self._text.append(token)
        new = self._state({}, self._length[self._last] + 1)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = 0 if state < 0 else self._split(state, token)
        self._last = new

    def _split(self, state: int, token: int) -> int:
        """Return the state of the longest suffix that a token after a state makes."""
        found = self._next[state][token]
        if self._length[state] + 1 == self._length[found]:
            return found
        clone = self._state(dict(self._next[found]), self._length[state] + 1)
        self._link[clone], self._latest[clone] = self._link[found], self._latest[found]
        self._link[found] = clone
        while state >= 0 and self._next[state].get(token) == found:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _state(self, following: dict[int, int], length: int) -> int:
        self._next.append(following)
        self._length.append(length)
        self._link.append(0)
        self._latest.append(len(self._text))
        return len(self._next) - 1

    def continuation(self, levels: int) -> list[int]:
        """Go on behind the latest place of the longest suffix that stood before."""
        state = self._link[self._last]
        if state <= 0 or self._length[state] < self._shortest:
            return []
        return periodic(self._text, self._latest[state], levels)


def periodic(text: Sequence[int], place: int, levels: int) -> list[int]:
    """Return what stands at a place; behind the text's end, it begins again."""
    period = len(text) - place
    return [text[place + step % period] for step in range(levels)]


FINDERS = {
    "n-grams of 1 to 3": lambda: Ngrams(3, 1),
    "n-grams of 2 to 4": lambda: Ngrams(4, 2),
    "n-grams of 5": lambda: Ngrams(5, 5),
    "n-grams of 2 to 8": lambda: Ngrams(8, 2),
    "n-grams of 1 to 16": lambda: Ngrams(16, 1),
    "n-grams of 2 to 16": lambda: Ngrams(16, 2),
    "n-grams of 3 to 16": lambda: Ngrams(16, 3),
    "suffix automaton, 1 or more": lambda: SuffixAutomaton(1),
    "suffix automaton, 2 or more": lambda: SuffixAutomaton(2),
    "suffix automaton, 3 or more": lambda: SuffixAutomaton(3),
}


@dataclass(frozen=True)
class Simulated:
    """What a finder would have done for a greedy text.

    Attributes:
        rounds: Rounds, of which each adds one token and what it accepts.
        drafting: Rounds that drafted something.
        accepted: Drafted tokens that were accepted.
    """

    rounds: int
    drafting: int
    accepted: int


def simulate(finder: Finder, prompt: Sequence[int], text: Sequence[int], levels: int) -> Simulated:
    """Count rounds on a text that is known; its first token belongs to no round."""
    for token in (*prompt, text[0]):
        finder.push(token)
    done, rounds, drafting, accepted = 1, 0, 0, 0
    while done < len(text):
        drafted = finder.continuation(min(levels, len(text) - done - 1))
        good = 0
        while good < len(drafted) and drafted[good] == text[done + good]:
            good += 1
        for token in text[done : done + good + 1]:
            finder.push(token)
        rounds, drafting, accepted = rounds + 1, drafting + bool(drafted), accepted + good
        done += good + 1
    return Simulated(rounds, drafting, accepted)


def simulated_rows(
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    texts: Mapping[int, Sequence[int]],
    levels: int,
) -> list[dict[str, Any]]:
    """Return a row for each finder and kind of prompts."""
    rows = []
    for name, make in FINDERS.items():
        by_kind: dict[str, list[Simulated]] = {}
        for number, question in enumerate(questions):
            found = simulate(make(), prompts[number], texts[number], levels)
            by_kind.setdefault(question.category, []).append(found)
        for kind, found in by_kind.items():
            rounds, drafting, accepted = (
                sum(getattr(own, field) for own in found)
                for field in ("rounds", "drafting", "accepted")
            )
            rows.append(
                {
                    "finder": name,
                    "kind": kind,
                    "tokens_per_round": 1 + accepted / rounds,
                    "rounds_with_a_draft": drafting / rounds,
                    "accepted_per_draft": accepted / max(drafting, 1),
                }
            )
    return rows


def open_ways(args: argparse.Namespace) -> dict[str, Engine]:
    """Open plain decoding, lookups alone and, with a draft, the draft without and with lookups.

    Raises:
        EasySpecError: As open_model.
    """
    levels = args.num_speculative_tokens
    lookup = {
        "prompt_lookup_max": args.prompt_lookup_max,
        "prompt_lookup_min": args.prompt_lookup_min,
        "num_speculative_tokens": levels,
    }
    if args.target is not None and args.draft is None:
        alone = open_pair(args, SpeculativeConfig(method="ngram", **lookup))
        return {PLAIN: alone.baseline(), "ngram": alone}
    chain = open_pair(args, SpeculativeConfig(method="sd", num_speculative_tokens=levels))
    return {
        PLAIN: chain.baseline(),
        "ngram": chain.variant(SpeculativeConfig(method="ngram", **lookup)),
        "sd": chain,
        "sd, prompt lookup": chain.variant(
            SpeculativeConfig(method="sd", prompt_lookup=True, **lookup)
        ),
    }


def timed_rows(
    questions: Sequence[Question], measured: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """Return a row for each way and kind of prompts; ratios are to the first way, per repeat."""
    rows = []
    for kind in dict.fromkeys(question.category for question in questions):
        numbers = [n for n, question in enumerate(questions) if question.category == kind]
        speeds = {name: _speeds(own, numbers) for name, own in measured.items()}
        plain = measured[PLAIN]
        for name, own in measured.items():
            ratios = [a / b for a, b in zip(speeds[name], speeds[PLAIN], strict=True)]
            rows.append(
                {
                    "way": name,
                    "kind": kind,
                    "tokens_per_second": speeds[name],
                    "over_plain": ratios,
                    "same_tokens": all(own.texts[n] == plain.texts[n] for n in numbers),
                }
            )
    return rows


def _speeds(own: Measured, numbers: Sequence[int]) -> list[float]:
    tokens = sum(len(own.texts[number]) for number in numbers)
    return [tokens / sum(seconds[number] for number in numbers) for seconds in own.seconds]


def tabulate(measured: Mapping[str, Any]) -> Rows:
    """Tabulate speeds over plain decoding, then what each finder reaches."""
    speeds, reached = speeds_by_kind(measured), reached_by_kind(measured)
    named = [(row, "speed over plain") for row in speeds]
    named += [(row, "tokens a round") for row in reached]
    return [
        {"": f"{row['']}: {figure}"} | {k: v for k, v in row.items() if k} for row, figure in named
    ]


def speeds_by_kind(measured: Mapping[str, Any]) -> Rows:
    """Tabulate medians of the speed over plain decoding; a column for each kind of prompts."""
    table: dict[str, dict[str, Any]] = {}
    for row in measured["results"]:
        if "way" in row:
            own = table.setdefault(row["way"], {"": row["way"]})
            own[row["kind"]] = f"{median(row['over_plain']):.2f}"
    return list(table.values())


def reached_by_kind(measured: Mapping[str, Any]) -> Rows:
    """Tabulate the tokens a round of each finder; a column for each kind of prompts."""
    table: dict[str, dict[str, Any]] = {}
    for row in measured["results"]:
        if "finder" in row:
            own = table.setdefault(row["finder"], {"": row["finder"]})
            own[row["kind"]] = f"{row['tokens_per_round']:.2f}"
    return list(table.values())


def print_table(rows: Rows) -> None:
    """Print the rows."""
    table = Table(*rows[0], box=None, pad_edge=False)
    align_right(table.columns[1:])
    for row in rows:
        table.add_row(*map(str, row.values()))
    show(table)


def check(args: argparse.Namespace) -> list[Question]:
    """Check the flags of an experiment that times ways on questions, and read the questions.

    Raises:
        EasySpecError: There is nothing to repeat, or a file cannot be read or written.
    """
    if args.repeats < 1:
        raise EasySpecError(f"--repeats {args.repeats} must be at least 1")
    if args.max_new_tokens < 2:
        raise EasySpecError(
            f"--max-new-tokens {args.max_new_tokens} must be at least 2, as no round makes the "
            "first token"
        )
    check_destination(args.out)
    cache_compilations()
    return read_questions(args.questions or DATA / "lookups.jsonl")


def timed(
    args: argparse.Namespace,
    questions: Sequence[Question],
    engines: Mapping[str, Engine],
    temperature: float = 0.0,
) -> tuple[list[tuple[int, ...]], Mapping[str, Measured]]:
    """Complete every question in every way, alternating; return the prompts' ids and the times."""
    plain = engines[PLAIN]
    chat = bool(plain.tokenizer.chat_template)
    asked = {
        tuple(plain.encode(question.turns[0], chat)): question.turns[0] for question in questions
    }
    if len(asked) < len(questions):
        raise EasySpecError("some questions have the same first turn; leave out all but one")
    sampling = SamplingParams(temperature=temperature, max_new_tokens=args.max_new_tokens)
    ways = {name: ours(engine, asked, sampling, chat) for name, engine in engines.items()}
    return list(asked), alternate(ways, list(asked), args.repeats)


def circumstances(plain: Engine) -> dict[str, Any]:
    """Return what an engine says of its platform, its type and its prompts."""
    return {
        "platform": plain.mesh.devices.flat[0].platform,
        "dtype": plain.dtype,
        "chat": bool(plain.tokenizer.chat_template),
    }


def write(
    args: argparse.Namespace,
    found: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    has_draft: bool,
    *left_out: str,
) -> None:
    """Write the rows, and what they were measured with.

    Args:
        args: The flags.
        found: What circumstances() returned.
        rows: The rows.
        has_draft: Whether a draft model was among the ways.
        left_out: Flags that say nothing about what was measured.
    """
    fields = settings(args, *left_out, "questions", "target", "draft") | names(args)
    if not has_draft:
        del fields["draft"]
    fields |= found
    save(args.out, as_json(fields | {"machine": machine(found["platform"]), "results": rows}))


def run(args: argparse.Namespace) -> None:
    """Measure, print and write the JSON."""
    questions = check(args)
    engines = open_ways(args)
    prompts, measured = timed(args, questions, engines)
    rows = timed_rows(questions, measured)
    texts = measured[PLAIN].texts
    rows += simulated_rows(questions, prompts, texts, args.num_speculative_tokens)
    print_table(speeds_by_kind({"results": rows}))
    print_table(reached_by_kind({"results": rows}))
    write(args, circumstances(engines[PLAIN]), rows, "sd" in engines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    default = SpeculativeConfig()
    parser = Parser(prog="python -m experiments.lookup", description=__doc__)
    add_flags(parser)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--prompt-lookup-max", type=int, default=default.prompt_lookup_max)
    parser.add_argument("--prompt-lookup-min", type=int, default=default.prompt_lookup_min)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "lookup.json")
    return run_experiment("experiments.lookup", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
