"""Draws what experiments.acceptance measured: `python -m experiments.draw_acceptance JSON [--out PNG]`.

As the paper's Figure 4, with what one pass of the target yields in the place of throughput.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, SOFT, STYLE, WHITE, png
from experiments.output import draw_again

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""What was measured of one variant."""

PANELS = {"mean_acceptance_length": "Tokens per target pass", "acceptance_rate": "Acceptance rate"}

COLORS = ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
MARKERS = "osD^vP"
"""Both by tree width; the colours are those of Okabe and Ito."""

STROKES: dict[str, dict[str, Any]] = {
    "calibrated": {"linestyle": "-"},
    "not calibrated": {"linestyle": (0, (4, 2)), "markerfacecolor": WHITE},
    "refit": {"linestyle": (0, (1, 1.5))},
}
"""By how a fuzzy draft is kept near the exact one; what is refit is calibrated too."""

OWN_STYLE = {"axes.titlesize": 11, "lines.markersize": 5, "figure.constrained_layout.h_pad": 0.08}


@dataclass(frozen=True)
class Line:
    """A tree width with one kind of fuzzy draft, over N; all start at the exact draft."""

    width: int
    kind: str
    style: dict[str, Any]

    def has(self, row: Row) -> bool:
        return row["tree_width"] == self.width and (
            row["lp_size"] == 1 or kind_of(row) == self.kind
        )


def kind_of(row: Row) -> str:
    """Which of STROKES is the row's."""
    if row.get("refit"):
        return "refit"
    return "calibrated" if row["calibration"] else "not calibrated"


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """A line for every width and kind there is; those of a width have one colour."""
    widths, kinds = sorted({row["tree_width"] for row in rows}), {kind_of(row) for row in rows}
    return [
        Line(width, kind, {"color": color, "marker": marker} | stroke)
        for width, color, marker in zip(widths, cycle(COLORS), cycle(MARKERS), strict=False)
        for kind, stroke in STROKES.items()
        if kind in kinds
    ]


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured), STYLE | OWN_STYLE)


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    results = measured["results"]
    ways = {way: [row for row in results if way_of(row) == way] for way in map(way_of, results)}
    lines = lines_of(results)
    figure = Figure(figsize=(10, 1.2 + 3 * len(ways)), dpi=120, layout="constrained")
    figure.suptitle(title_of(measured), weight="bold", size=13)
    panels = figure.subplots(len(ways), len(PANELS), squeeze=False)
    for (way, rows), beside in zip(ways.items(), panels, strict=True):
        for (name, title), axes in zip(PANELS.items(), beside, strict=True):
            axes.set_title(f"{title}: {way}")
            draw_panel(axes, lines, rows, name)
    for axes in panels[-1]:
        axes.set_xlabel("N, draft layers that run at once")
    draw_legend(figure, lines)
    return figure


def way_of(row: Row) -> str:
    """How the row's tokens were chosen."""
    return (
        "greedy"
        if row["temperature"] == 0
        else f"temperature {row['temperature']:g}, {row['verifier']}"
    )


def draw_panel(axes: "Axes", lines: Sequence[Line], rows: Sequence[Row], name: str) -> None:
    """One figure over N."""
    for line in reversed(lines):  # calibrated ones come last, on top
        points = sorted((row["lp_size"], row[name]) for row in rows if line.has(row))
        axes.plot(*zip(*points, strict=True), **line.style)
    axes.set_xticks(sorted({row["lp_size"] for row in rows}))
    axes.tick_params(colors=SOFT, labelcolor=INK)


def draw_legend(figure: "Figure", lines: Sequence[Line]) -> None:
    """What colours and strokes mean, below the panels."""
    from matplotlib.lines import Line2D

    first = lines[0].kind
    widths = [
        Line2D([], [], **line.style, label=f"tree width {line.width}")
        for line in lines
        if line.kind == first
    ]
    kinds = dict.fromkeys(line.kind for line in lines)
    strokes = [
        Line2D([], [], color=SOFT, **STROKES[kind], marker="o", label=kind) for kind in kinds
    ]
    figure.legend(
        handles=[*widths, *strokes], loc="outside lower center", ncols=len(widths) + len(strokes)
    )


def title_of(measured: dict[str, Any]) -> str:
    """The pair, and what was decoded."""
    target, draft = measured["target"], measured["draft"]
    pair = f"{target} drafting for itself" if target == draft else f"{target}, drafted by {draft}"
    texts = f"{len(measured['prompts'])} prompts of up to {measured['max_new_tokens']} tokens"
    levels = f"{measured['num_speculative_tokens']} levels a round"
    return f"{'The bundled pair' if measured['bundled'] else pair}: {levels}, {texts}"


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_acceptance", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
