"""Draws what experiments.table4 measured: `python -m experiments.draw_table4 JSON [--out PNG]`.

Left, how much of the exact draft's distribution is left by depth; right, the same at the last depth against the
collectives of a draft step, which is the frontier to choose from.
"""

import sys
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import SOFT, WHITE, png
from experiments.output import draw_again

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
    kinds = list(dict.fromkeys((row["lp_size"], row["mlp_lp_size"]) for row in rows))
    looks = dict(zip(kinds, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    figure.suptitle(f"{measured['draft']}: what fuzzy passes keep of the exact distribution", weight="bold", size=13)
    by_depth, frontier = figure.subplots(1, 2, sharey=True)
    for row in rows:
        color, marker = looks[row["lp_size"], row["mlp_lp_size"]]
        line, face = ("-", color) if row["refit"] else ((0, (4, 2)), WHITE)
        style = {"color": color, "marker": marker, "markerfacecolor": face}
        by_depth.plot(range(1, len(row["overlap"]) + 1), row["overlap"], linestyle=line, **style)
        frontier.plot([row["collectives"]], [row["overlap"][-1]], linestyle="", markersize=8, **style)
    by_depth.set_xticks(range(1, 1 + max(len(row["overlap"]) for row in rows)))
    by_depth.set_xlabel("draft depth")
    by_depth.set_ylabel("Σ min(p fuzzy, p exact)")
    frontier.set_xlabel("collectives of a draft step")
    frontier.locator_params(axis="x", integer=True)
    frontier.set_title("at the last depth", size=11)
    by_depth.set_title("by depth", size=11)
    handles = [Line2D([], [], color=c, marker=m, label=_name(*kind)) for kind, (c, m) in looks.items()]
    handles += [
        Line2D([], [], color=SOFT, linestyle="-", marker="o", label="refit"),
        Line2D([], [], color=SOFT, linestyle=(0, (4, 2)), marker="o", markerfacecolor=WHITE, label="plain"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _name(lp_size: int, mlp_lp_size: int) -> str:
    return f"N = {lp_size}" + (f", M = {mlp_lp_size}" if mlp_lp_size > 1 else "")


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_table4", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
