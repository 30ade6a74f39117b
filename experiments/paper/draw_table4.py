"""Draws what experiments.table4 measured: `python -m experiments.draw_table4 JSON [--out PNG]`.

How much of the exact draft's distribution is left, by depth.
"""

import sys
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import SOFT, WHITE, png
from experiments.output import draft_title, draw_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"
"""Both by group sizes; the colours are those of Okabe and Ito."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = measured["results"]
    sizes = list(dict.fromkeys(row["lp_size"] for row in rows))
    looks = dict(zip(sizes, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    figure = Figure(figsize=(7, 4.8), dpi=120, layout="constrained")
    title = f"What fuzzy passes of {draft_title(measured)} keep\nof its distribution"
    figure.suptitle(title, weight="bold", size=13)
    axes = figure.subplots()
    for row in rows:
        color, marker = looks[row["lp_size"]]
        line, face = ("-", color) if row["refit"] else ((0, (4, 2)), WHITE)
        style = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": line}
        axes.plot(range(1, len(row["overlap"]) + 1), row["overlap"], **style)
    axes.set_xticks(range(1, 1 + max(len(row["overlap"]) for row in rows)))
    axes.set_xlabel("draft depth")
    axes.set_ylabel("Σ min(p fuzzy, p exact)")
    handles = [
        Line2D([], [], color=c, marker=m, label=f"N = {size}") for size, (c, m) in looks.items()
    ]
    if any(row["refit"] for row in rows):
        handles += [
            Line2D([], [], color=SOFT, linestyle="-", marker="o", label="refit"),
            Line2D(
                [],
                [],
                color=SOFT,
                linestyle=(0, (4, 2)),
                marker="o",
                markerfacecolor=WHITE,
                label="plain",
            ),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_table4", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
