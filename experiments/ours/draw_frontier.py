"""Draws what experiments.frontier measured: `python -m experiments.draw_frontier JSON [--out PNG]`.

A curve a depth, over the collectives of a fuzzy pass, through those layouts that no other beats at that depth.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import png
from experiments.output import draft_title, draw_again

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = (("#000000", "o"), ("#0072b2", "s"), ("#d55e00", "D"), ("#56b4e9", "^"))
"""By depth; the colours are those of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    kinds = [kind for kind in (False, True) if any(row["refit"] == kind for row in rows)]
    figure = Figure(figsize=(1.2 + 5.2 * len(kinds), 4.8), dpi=120, layout="constrained")
    title = f"What a fuzzy pass of {draft_title(measured)} keeps\nby what it waits for"
    figure.suptitle(title, weight="bold", size=13)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _curves(axes, [row for row in rows if row["refit"] == kind])
        axes.set_title("with a refit" if kind else "plain", size=11)
    panels[0].set_ylabel("Σ min(p fuzzy, p exact)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS)
    )
    return figure


def _curves(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    places = [row["collectives"] for row in rows]
    for depth, (color, marker) in enumerate(LOOKS):
        values = [row["overlap"][depth] for row in rows]
        axes.plot(places, values, marker, color=color, markersize=5, label=f"depth {depth + 1}")
        axes.plot(*zip(*frontier(rows, depth), strict=True), color=color, linewidth=1.2)
    axes.set_xlabel("collectives of a fuzzy pass")
    axes.locator_params(axis="x", integer=True)


def frontier(rows: Sequence[dict[str, Any]], depth: int) -> list[tuple[int, float]]:
    """Collectives and overlap of what keeps more than everything with no more collectives, fewest first."""
    found: list[tuple[int, float]] = []
    for row in sorted(rows, key=lambda row: (row["collectives"], -row["overlap"][depth])):
        if not found or row["overlap"][depth] > found[-1][1]:
            found.append((row["collectives"], row["overlap"][depth]))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_frontier", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
