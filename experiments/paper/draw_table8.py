"""Draws what experiments.table8 measured: `python -m experiments.draw_table8 JSON [--out PNG]`.

A bar for each pair and way: the speed-up over plain decoding, with the acceptance rate beside it.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, WHITE, dress_bars, png
from experiments.output import draw_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"sd": "#e2e2e2", "tree": "#e69f00", "easyspec": "#0072b2"}
"""Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = [row for row in measured["results"] if row["way"] in COLORS]
    pairs = list(dict.fromkeys((row["target"], row["draft"]) for row in rows))
    figure = Figure(figsize=(9, 1.6 + 0.95 * len(pairs)), dpi=120, layout="constrained")
    figure.suptitle(
        f"Speed over plain decoding by pair, --mesh {measured['mesh']}", weight="bold", size=13
    )
    axes = figure.subplots()
    height = 0.8 / len(COLORS)
    for index, (way, color) in enumerate(COLORS.items()):
        own = [row for row in rows if row["way"] == way]
        places = [pairs.index((row["target"], row["draft"])) + (index - 1) * height for row in own]
        axes.barh(
            places, [row["speedup"] for row in own], color=color, height=0.9 * height, label=way
        )
        for place, row in zip(places, own, strict=True):
            text = f"{row['speedup']:.2f} ×, α {row['acceptance_rate']:.2f}"
            style: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (4, 0),
                "va": "center",
                "size": 9,
            }
            style["bbox"] = {"facecolor": WHITE, "edgecolor": "none", "pad": 1}
            axes.annotate(text, (row["speedup"], place), **style)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(
        range(len(pairs)), [f"{target},\ndrafted by {draft}" for target, draft in pairs]
    )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("times plain decoding")
    dress_bars(axes)
    figure.legend(loc="outside lower center", ncols=len(COLORS))
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_table8", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
