"""The one or two figures of each step that a summary shows, from its file of results.

A file may hold only some of what was asked for; whatever is missing is left out.
"""

from collections.abc import Callable, Mapping
from typing import Any

Measured = Mapping[str, Any]
"""The content of a file of results."""

Figures = dict[str, Any]
"""Figures by what they say."""

Headline = Callable[[Measured], Figures]


def environment(measured: Measured) -> Figures:
    """Name the device and its memory."""
    here, memory = measured["machine"], measured["device_memory_bytes"]
    gibibytes = None if memory is None else f"{memory / 2**30:.0f}"
    return known({"device": here["device_kind"], "GiB": gibibytes, "jax": here["jax"]})


def correctness(measured: Measured) -> Figures:
    """Count the checks that passed."""
    rows = measured["results"]
    failed = [row["check"] for row in rows if not row["passed"]]
    return known(
        {"passed": f"{len(rows) - len(failed)} of {len(rows)}", "failed": "; ".join(failed) or None}
    )


def passes(measured: Measured) -> Figures:
    """Return the plain step's share of bandwidth, and verification of 32 tokens over plain."""
    return known(
        {
            "GB/s": highest(measured, "bandwidth", "GB_per_second"),
            "share of bandwidth": cell(measured, "target", "plain step", "share_of_bandwidth"),
            "32 tokens over plain": cell(measured, "target", "32 tokens", "over_plain"),
        }
    )


def drafts(measured: Measured) -> Figures:
    """Return how far a fuzzy step is from its floor, as a multiple of an exact step's distance."""
    return known(
        {
            "gap at N = 4": cell(measured, "draft", "fuzzy, N = 4", "gap_over_exact"),
            "with MLP pairs": cell(measured, "draft", "fuzzy, N = 4, MLP pairs", "gap_over_exact"),
        }
    )


def rounds(measured: Measured) -> Figures:
    """Return a round's time over that of its parts."""
    return known({"round over parts": cell(measured, "round", "round, width 1", "over_parts")})


def profile(measured: Measured) -> Figures:
    """Return the kernels of a round, and the share of time in which one runs."""
    name = "round, N = 4"
    return known(
        {
            "kernels a round": cell(measured, "profile", name, "kernels"),
            "busy": cell(measured, "profile", name, "busy_share"),
        }
    )


def peers(measured: Measured) -> Figures:
    """Return the speed-up over plain decoding and over transformers' assisted generation."""
    return known(
        {
            "over plain": cell(measured, "peers", "easyspec", "over_plain"),
            "over assisted": cell(measured, "peers", "easyspec", "over_assisted"),
        }
    )


def synthetic(measured: Measured) -> Figures:
    """Return the speed-up over plain decoding at each acceptance."""
    rows = of_part(measured, "synthetic")
    return {row["name"]: row["over_plain"] for row in rows if row["name"] != "plain"}


def long_context(measured: Measured) -> Figures:
    """Return the plain step's share of bandwidth, and a round's time over that of its parts."""
    share = cell(measured, "target", "plain step", "share_of_bandwidth")
    return known({"share of bandwidth": share}) | rounds(measured)


def large(measured: Measured) -> Figures:
    """Return the same of a large pair, and its speed-ups."""
    return long_context(measured) | synthetic(measured)


def options(measured: Measured) -> Figures:
    """Name the fastest set of options, and its time over the default's."""
    timed = [row for row in of_part(measured, "options") if "over_default" in row]
    if not timed:
        return {}
    best = min(timed, key=lambda row: row["over_default"])
    return {"best options": best["name"], "over default": best["over_default"]}


def tune(measured: Measured) -> Figures:
    """Name the choice."""
    return {"choice": measured["choice"]["label"]}


def of_part(measured: Measured, part: str) -> list[dict[str, Any]]:
    """Return the rows of one of bench_roofline's parts; none if it was not reached."""
    return measured["parts"].get(part, {}).get("results", [])


def cell(measured: Measured, part: str, name: str, field: str) -> Any:
    """Return one figure of bench_roofline's, or None."""
    rows = [row for row in of_part(measured, part) if row["name"] == name]
    return rows[0].get(field) if rows else None


def highest(measured: Measured, part: str, field: str) -> Any:
    """Return the largest value of a field in a part, or None."""
    return max((row[field] for row in of_part(measured, part) if field in row), default=None)


def known(figures: Figures) -> Figures:
    """Leave out figures that are None.

    Examples:
        >>> known({"share": 0.5, "kernels": None})
        {'share': 0.5}
    """
    return {name: value for name, value in figures.items() if value is not None}
