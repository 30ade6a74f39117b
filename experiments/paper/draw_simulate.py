"""Draws what experiments.simulate estimated: `python -m experiments.draw_simulate JSON [--out PNG]`.

A panel a pair and machine: the predicted speed-up over one device by way of decoding, the draft on every device or
split over all, and what the paper measured on 8×A100. At temperature 0: others differ in their acceptance alone.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, dress_bars, png
from experiments.output import draw_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {None: "#bdbdbd", "1": "#0072b2", "all": "#e69f00"}
"""By draft TP; of Okabe and Ito, and far apart in grey."""

LABELS = {None: "no draft", "1": "draft on every device", "all": "draft split over all"}


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in measured["results"] if row["fits"] and row["temperature"] == 0]
    pairs = list(dict.fromkeys((row["target"], row["draft"]) for row in rows))
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    of = {pair: [row for row in rows if (row["target"], row["draft"]) == pair] for pair in pairs}
    ways = {pair: list(dict.fromkeys(row["way"] for row in own)) for pair, own in of.items()}
    heights = [0.8 + len(names) for names in ways.values()]
    figure = Figure(
        figsize=(2 + 3.2 * len(machines), 1.6 + 0.62 * sum(heights)), dpi=110, layout="constrained"
    )
    figure.suptitle(
        "Predicted speed-up over plain decoding on one device, greedily (estimates)",
        weight="bold",
        size=13,
    )
    grid = figure.subplots(
        len(pairs),
        len(machines),
        squeeze=False,
        sharex=True,
        sharey="row",
        gridspec_kw={"height_ratios": heights},
    )
    for line, pair in zip(grid, pairs, strict=True):
        for axes, machine in zip(line, machines, strict=True):
            _draw_panel(axes, [row for row in of[pair] if row["machine"] == machine], ways[pair])
            axes.set_title(f"{machine}: {pair[0]}, {pair[1]}", size=9)
    for axes in grid[-1]:
        axes.set_xlabel("× one device")
    handles: list[Any] = [Patch(color=color, label=LABELS[size]) for size, color in COLORS.items()]
    marker = Line2D(
        [], [], color=INK, marker="D", linestyle="none", label="the paper, measured on 8×A100"
    )
    figure.legend(handles=[*handles, marker], loc="outside lower center", ncols=4)
    return figure


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]], ways: Sequence[str]) -> None:
    for row in rows:
        size = row["draft_tensor_parallel_size"]
        place = ways.index(row["way"]) + {None: 0, "1": -0.2, "all": 0.2}[size]
        axes.barh(place, row["speedup"], height=0.64 if size is None else 0.36, color=COLORS[size])
        end = max(row["speedup"], row["paper_speedup"] or 0)  # behind the paper's mark too
        at = {"textcoords": "offset points", "xytext": (6, 0), "va": "center", "size": 8}
        axes.annotate(f"{row['speedup']:.1f}", (end, place), **at)
        if row["paper_speedup"] is not None:
            axes.plot(row["paper_speedup"], ways.index(row["way"]), marker="D", color=INK, markersize=6,
                      markeredgecolor="white")  # fmt: skip
    axes.margins(x=0.16)
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    dress_bars(axes)


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_simulate", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
