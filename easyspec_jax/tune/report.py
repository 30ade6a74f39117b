"""Results as one object and as a table; `--json` prints what the table shows."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyspec_jax.engine.tuned_file import describe, label
from easyspec_jax.tune.predict import frontier
from easyspec_jax.tune.tuning import Row, Tuned

SHOWN = 16
"""Rows of the table; the object has all candidates."""


def as_dict(tuned: Tuned) -> dict[str, Any]:
    """Return results as `--json` prints them, with times in seconds and the best candidate first.

    `weights` names the types of matrices that differ from `dtype`, as "target int8, draft int4".
    Of each candidate, acceptance_rate is the share of drafted positions accepted at its number of
    levels, and deepest_acceptance_rate that at the most levels. `accepted_by_levels` has the mean
    accepted tokens of rounds of 1, 2, … levels, or None if not measured. `frontier` says that no
    other draft has both a shorter step and a higher deepest rate. `missing` names what was not
    measured because even the best possible value would not have made the candidate win.
    """
    engine, figures = tuned.engine, tuned.figures
    assert engine.draft is not None
    device = engine.mesh.devices.flat[0]
    # A draft whose acceptance was not measured cannot be on the frontier; 0 keeps its place.
    points = [(row.prediction.step, row.deepest_acceptance or 0.0) for row in tuned.rows]
    on_frontier = frontier(points, [row.deepest_acceptance is not None for row in tuned.rows])
    return {
        "target": engine.target.directory.resolve().name,
        "draft": engine.draft.directory.resolve().name,
        "mesh": tuned.mesh,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "dtype": engine.dtype,
        "weights": engine.kept_weights,
        "kv_dtype": engine.kv_dtype,
        "seconds": tuned.seconds,
        "plain_step": figures.plain,
        "overhead": figures.overhead,
        "plain_tokens_per_second": tuned.plain,
        "verification": dict(figures.verification),
        "candidates": [_row(row, best) for row, best in zip(tuned.rows, on_frontier, strict=True)],
        "drafts_not_reached": tuned.not_reached,
        "choice": asdict(tuned.choice) | {"label": describe(tuned.choice)},
    }


def _row(row: Row, on_frontier: bool) -> dict[str, Any]:
    prediction = row.prediction
    speculative, shape = prediction.candidate.speculative, prediction.candidate.shape
    return {
        "label": label(speculative),
        "layer": shape.layer,
        "tensor": shape.tensor,
        "speculative": asdict(speculative),
        "step": prediction.step,
        "first": prediction.first,
        "verification": prediction.verification,
        "acceptance_rate": prediction.accepted / speculative.num_speculative_tokens,
        "deepest_acceptance_rate": row.deepest_acceptance,
        "accepted_by_levels": row.accepted,
        "missing": list(prediction.missing),
        "frontier": on_frontier,
        "predicted_tokens_per_second": prediction.tokens_per_second,
        "confirmed_tokens_per_second": row.confirmed,
    }


def print_tuned(found: dict[str, Any], console: Console) -> None:
    """Print the result of as_dict() as a table."""
    timings = ("step", "first", "verify")
    speeds = ("accepted", "predicted", "confirmed")
    table = Table("draft", "layer × tensor", "levels", *timings, *speeds, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(
        f"[bold]{escape(found['target'])}[/] with draft [bold]{escape(found['draft'])}[/] "
        f"on --mesh {found['mesh']} ({escape(found['device_kind'])}, {found['dtype']}), "
        f"measured in {found['seconds']:.0f} s; "
        f"passes in ms, speeds in tokens/s, {found['overhead'] * 1e3:.2g} ms a round for the host"
    )
    candidates = found["candidates"]
    confirmed = [candidate["confirmed_tokens_per_second"] or 0 for candidate in candidates]
    fastest = max([found["plain_tokens_per_second"], *confirmed])
    for candidate in candidates[:SHOWN]:
        table.add_row(*_cells(candidate, fastest))
    plain = _speed(found["plain_tokens_per_second"], fastest)
    step = f"{found['plain_step'] * 1e3:.3g}"
    # Plain decoding has no draft, so only its step and speeds are shown.
    table.add_row("plain decoding", "", "", "", "", step, "", _plain_speed(found), plain)
    console.print(table)
    more = len(candidates) - SHOWN
    notes = [
        "* on the frontier of step time and acceptance",
        "≤, ≥: not measured, because at best it loses",
    ]
    if more > 0:
        notes.append(f"{more} more in --json")
    if found["drafts_not_reached"]:
        notes.append(f"{found['drafts_not_reached']} placements not reached in time")
    console.print(f"[dim]{'; '.join(notes)}[/]")
    console.print(f"Best: [bold]{escape(found['choice']['label'])}[/]")


def _cells(candidate: dict[str, Any], fastest: float) -> list[str]:
    missing = candidate["missing"]

    def milliseconds(name: str) -> str:
        return ("≥ " if name in missing else "") + f"{candidate[name] * 1e3:.3g}"

    return [
        ("* " if candidate["frontier"] else "  ") + candidate["label"],
        f"{candidate['layer']} × {candidate['tensor']}",
        str(candidate["speculative"]["num_speculative_tokens"]),
        milliseconds("step"),
        milliseconds("first"),
        f"{candidate['verification'] * 1e3:.3g}",
        ("≤ " if "acceptance" in missing else "") + f"{candidate['acceptance_rate']:.2f}",
        ("≤ " if missing else "") + f"{candidate['predicted_tokens_per_second']:.1f}",
        _speed(candidate["confirmed_tokens_per_second"], fastest),
    ]


def _plain_speed(found: dict[str, Any]) -> str:
    return f"{1 / (found['plain_step'] + found['overhead']):.1f}"


def _speed(speed: float | None, fastest: float) -> str:
    if speed is None:
        return "–"
    return f"[bold green]{speed:.1f}[/]" if speed == fastest else f"{speed:.1f}"
