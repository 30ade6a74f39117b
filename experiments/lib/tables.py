"""Tables of results as Markdown."""

from collections.abc import Mapping, Sequence
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


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return one field of all rows."""
    return [row[name] for row in rows]


def distinct(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return the values that a field has, in the order of their first rows.

    Example:
        >>> distinct([{"N": 2}, {"N": 4}, {"N": 2}], "N")
        [2, 4]
    """
    return list(dict.fromkeys(column(rows, name)))


def matching(rows: Sequence[dict[str, Any]], **fields: Any) -> Rows:
    """Return the rows that have these values.

    Example:
        >>> matching([{"N": 2, "way": "sd"}, {"N": 4, "way": "sd"}], N=4)
        [{'N': 4, 'way': 'sd'}]
    """
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def labelled(row: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return some fields of a row under their labels; None for those that it lacks."""
    return {label: row.get(name) for name, label in labels.items()}


def overlaps(row: Mapping[str, Any]) -> dict[str, float]:
    """Return how much a draft keeps at each depth, as cells of a table."""
    return {f"overlap at depth {depth}": value for depth, value in enumerate(row["overlap"], 1)}


def speeds(measured: Mapping[str, Any]) -> Rows:
    """Tabulate ways of decoding: a row for each, with those of the fields in SPEEDS that it has.

    "±" is the standard deviation over prompts.
    """
    found = {name for row in measured["results"] for name in row}
    named = [name for name in SPEEDS if name in found]
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
    text = _line(names) + _line(["-"] * len(names))
    for row in rows:
        text += _line([cell(row.get(name)) for name in names])
    return text.rstrip("\n")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def cell(value: Any) -> str:
    """Write a cell: about three digits of a float, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
        return f"{value:.{digits}f}"
    return str(value).replace("|", "\\|")
