"""Draws what experiments.table6 measured or estimated: `python -m experiments.draw_table6 JSON [--out PNG]`.

One panel a machine and kind of step, above plain decoding and below drafting; steps a second by the number of devices.
What does not fit the memory is left out. The paper's own figures are in the last panel of plain decoding.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, SOFT, png
from experiments.output import draw_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#e69f00")
MARKERS = "osD^vP"
LINES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 1, 1, 1)),
    (0, (8, 2, 2, 2)),
    (0, (2, 3)),
)
"""By the way of decoding, told apart without colours too; the colours are those of Okabe and Ito."""

PLAIN, HERE, PAPER = "plain decoding", "here", "the paper, A100"

Series = dict[str, dict[int, float]]
"""Steps a second by the number of devices, line by line."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def panels(measured: Mapping[str, Any]) -> tuple[dict[str, Series], dict[str, Series]]:
    """What is drawn: of plain decoding, then of drafting, by the title of a panel."""
    plain: dict[str, Series] = {}
    drafts: dict[str, Series] = {}
    for row in measured["results"]:
        if row.get("fits") is False:
            continue
        machine = row.get("machine", HERE)
        if row["way"] == PLAIN:
            lines = plain.setdefault(machine, {}).setdefault(row["model"], {})
        else:
            lines = drafts.setdefault(f"{machine}, {row['model']}", {}).setdefault(row["way"], {})
        lines[row["devices"]] = row["steps_per_second"]
    if "paper" in measured:
        paper = {
            name: {int(size): speed for size, speed in line.items()}
            for name, line in measured["paper"].items()
        }
        plain[PAPER] = paper
    return plain, drafts


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    plain, drafts = panels(measured)
    columns = min(4, max(len(plain), len(drafts)))
    rows = [
        list(of.items())[at : at + columns]
        for of in (plain, drafts)
        for at in range(0, len(of), columns)
    ]
    figure = Figure(
        figsize=(1.5 + 3.6 * columns, 0.8 + 3.4 * len(rows)), dpi=110, layout="constrained"
    )
    source = "measured" if measured["measured"] else "estimated by the cost model"
    figure.suptitle(f"Steps a second by the number of devices, {source}", weight="bold", size=13)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, own in zip(grid, rows, strict=True):
        for axes in line[len(own) :]:
            axes.set_visible(False)
        for axes, (title, series) in zip(line, own, strict=False):
            drafted = title in drafts
            _draw_panel(
                axes,
                series,
                f"drafting: {title}" if drafted else f"{PLAIN}: {title}",
                measured["devices"],
            )
            axes.set_ylabel("draft steps/s" if drafted else "tokens/s")
            if not drafted:
                axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
                axes.legend(
                    fontsize=7.5, loc="upper left", ncols=2, handlelength=2.6, columnspacing=1
                )
    lines = {line.get_label(): line for axes in grid[-1] for line in axes.get_lines()}
    figure.legend(
        handles=list(lines.values()), loc="outside lower center", ncols=len(lines), title="drafting"
    )
    return figure


def _draw_panel(axes: Any, series: Series, title: str, devices: Sequence[int]) -> None:
    looks = zip(cycle(COLORS), cycle(MARKERS), cycle(LINES), strict=False)
    for (name, points), (color, marker, style) in zip(series.items(), looks, strict=False):
        places = sorted(points)
        speeds = [points[place] for place in places]
        axes.plot(
            places, speeds, color=color, marker=marker, linestyle=style, markersize=5, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(size) for size in devices])
    axes.minorticks_off()
    axes.set_xlabel("devices")
    axes.set_ylim(
        0, 1.08 * max((speed for points in series.values() for speed in points.values()), default=1)
    )
    axes.set_title(title, size=10)
    axes.tick_params(colors=SOFT, labelcolor=INK)


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_table6", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
