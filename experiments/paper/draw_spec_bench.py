"""Draws what experiments.spec_bench measured: `python -m experiments.draw_spec_bench JSON [--out PNG]`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, dress_bars, png
from experiments.output import draw_again, pair_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEED, LENGTH = "#0072b2", "#e69f00"
"""Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    figure = Figure(figsize=(9, 1.8 + 0.36 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(f"{pair_title(measured)}, --mesh {measured['mesh']}", weight="bold", size=13)
    speed, length = figure.subplots(1, 2, sharey=True)
    panels = (
        (
            speed,
            "speed over plain decoding",
            "speedup",
            SPEED,
            [row["speedup_deviation"] for row in rows],
        ),
        (length, "tokens a round", "mean_acceptance_length", LENGTH, None),
    )
    for axes, label, name, color, deviations in panels:
        values = [row[name] for row in rows]
        axes.barh(
            range(len(rows)),
            values,
            xerr=deviations,
            color=color,
            height=0.62,
            ecolor=INK,
            capsize=3,
        )
        for place, value in enumerate(values):
            text: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (4, 0),
                "va": "center",
                "size": 9,
            }
            axes.annotate(
                f"{value:.2f}", (value + (deviations[place] if deviations else 0), place), **text
            )
        axes.set_xlabel(label)
        axes.margins(x=0.16)
        dress_bars(axes)
        axes.set_yticks(
            range(len(rows)), [f"{row['category']}\n{row['questions']} questions" for row in rows]
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)
    speed.axvline(1, color=INK, linewidth=1, linestyle=":")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_spec_bench", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
