"""Draws what experiments.tune_check measured: `python -m experiments.draw_tune_check JSON [--out PNG]`.

A panel a mesh: every candidate of the sweep by its gain, and where the choice is.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import SOFT, png
from experiments.output import draw_again, pair_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOICE, FASTEST = "#d55e00", "#0072b2"
"""Of Okabe and Ito."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    figure = Figure(figsize=(1.2 + 4.8 * len(rows), 4.6), dpi=120, layout="constrained")
    figure.suptitle(
        f"{pair_title(measured)}: tune's choice\namong all candidates", weight="bold", size=13
    )
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        _sweep(axes, row)
    panels[0].set_ylabel("times plain decoding")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _sweep(axes: "Axes", row: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    gains = sorted(row["gains"].values(), reverse=True)
    axes.plot(
        range(1, len(gains) + 1), gains, "o", color=SOFT, markersize=4, label="candidates, as swept"
    )
    axes.axhline(
        row["fastest_over_plain"],
        color=FASTEST,
        linestyle=(0, (4, 2)),
        label="the fastest, run again",
    )
    axes.axhline(row["choice_over_plain"], color=CHOICE, label="the choice, run beside it")
    axes.set_title(f"--mesh {row['mesh']}: {row['choice']}", size=9)
    axes.set_xlabel("candidates, best first")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_tune_check", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
