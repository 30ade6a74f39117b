"""Draws what experiments.two_processes measured: `python -m experiments.draw_two_processes JSON [--out PNG]`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import dress_bars, png
from experiments.output import draft_title, draw_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {2: "two processes, a core each", 1: "one process, the same two cores"}
COLORS = {2: "#0072b2", 1: "#e69f00"}
"""Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(row["way"] for row in measured["results"]))
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(ways)), dpi=120, layout="constrained")
    figure.suptitle(f"A step of {draft_title(measured)} on two devices", weight="bold", size=13)
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for axes, (processes, title) in zip(panels, TITLES.items(), strict=True):
        rows = {row["way"]: row for row in measured["results"] if row["processes"] == processes}
        times = [1e3 * rows[way]["step_seconds"] for way in ways]
        axes.barh(range(len(ways)), times, color=COLORS[processes], height=0.62)
        for place, way in enumerate(ways):
            text: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (4, 0),
                "va": "center",
                "size": 9,
            }
            axes.annotate(
                f"{times[place]:.1f}, {rows[way]['time_of_tp']:.2f} × TP",
                (times[place], place),
                **text,
            )
        axes.set_title(title, size=11)
        axes.set_xlabel("milliseconds")
        axes.margins(x=0.3)
        dress_bars(axes)
        axes.set_yticks(
            range(len(ways)), [f"{way}\n{rows[way]['collectives']} collectives" for way in ways]
        )
        axes.set_ylim(len(ways) - 0.5, -0.5)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_two_processes", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
