"""Draws what experiments.table5 measured: `python -m experiments.draw_table5 JSON [--out PNG]`.

Acceptance, the time of a draft step and the speed-up over plain decoding, by what runs at once.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import dress_bars, png
from experiments.output import draw_again, pair_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"in order": "#000000", "attention only": "#0072b2", "whole layers": "#e69f00"}
"""Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in measured["results"] if row["acceptance_rate"] is not None]
    panels = {
        "acceptance rate": [row["acceptance_rate"] for row in rows],
        "milliseconds a draft step": [1e3 * row["step_seconds"] for row in rows],
        "speed over plain decoding": [row["speedup"] for row in rows],
    }
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(f"{pair_title(measured)}, --mesh {measured['mesh']}", weight="bold", size=13)
    for axes, (name, values) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        axes.barh(
            range(len(rows)), values, color=[COLORS[row["at_once"]] for row in rows], height=0.62
        )
        for place, value in enumerate(values):
            text: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (4, 0),
                "va": "center",
                "size": 9,
            }
            axes.annotate(f"{value:.2f}", (value, place), **text)
        axes.set_xlabel(name)
        axes.margins(x=0.16)
        dress_bars(axes)
        axes.set_yticks(range(len(rows)), [row["way"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_table5", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
