"""Tables of results as Markdown."""

from collections.abc import Mapping
from typing import Any

Rows = list[dict[str, Any]]
"""Rows of named cells."""

SPEEDS = {
    "temperature": "T",
    "set": "set",
    "target": "target",
    "draft": "draft",
    "way": "way",
    "acceptance_rate": "α",
    "step_seconds": "ms a draft step",
    "seconds_per_100_tokens": "s/100 tokens",
    "drafting": "drafting",
    "verification": "verification",
    "speedup": "speed-up",
    "phases_over_round": "phases/round",
}
"""Fields of a row that compares ways of decoding, and their columns."""


def speeds(measured: Mapping[str, Any]) -> Rows:
    """Tabulate ways of decoding: a row for each, with those of the fields in SPEEDS that it has.

    "±" is the standard deviation over prompts.
    """
    named = [name for name in SPEEDS if any(name in row for row in measured["results"])]
    table = []
    for row in measured["results"]:
        shown = {SPEEDS[name]: _with_deviation(row, name) for name in named}
        table.append(shown | {"T": f"{row['temperature']:g}"})
    return table


def _with_deviation(row: Mapping[str, Any], name: str) -> Any:
    """Return a field with its deviation, if the row has one; a step's seconds as milliseconds."""
    value, deviation = row.get(name), row.get(f"{name}_deviation")
    if value is not None and deviation is not None:
        return f"{value:.3f} ± {deviation:.3f}"
    return 1e3 * value if name == "step_seconds" and value is not None else value


def flat(measured: Mapping[str, Any]) -> Rows:
    """Tabulate any file of results: those fields of its rows that are single figures or words."""
    rows = measured.get("results")
    if not isinstance(rows, list):
        return []
    table = []
    for row in rows:
        single = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        table.append(single)
    return table


def markdown(rows: Rows) -> str:
    """Write rows as a Markdown table with the columns of all of them.

    Example:
        >>> print(markdown([{"way": "sd", "speed-up": 1.5}, {"way": "tree"}]))
        | way | speed-up |
        | - | - |
        | sd | 1.50 |
        | tree |  |
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["-"] * len(names)]
    lines += [[cell(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Write a cell: about three digits of a float, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
        return f"{value:.{digits}f}"
    return str(value).replace("|", "\\|")
