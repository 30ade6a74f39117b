"""Draws what experiments.peers measured: `python -m experiments.draw_peers JSON [--out PNG]`.

One bar a way of decoding: its speed over that of our plain decoding, the median over the repeats, with the least and
the most; beside it how much of its texts is the same.
"""

import sys
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, SOFT, WHITE, dress_bars, png
from experiments.output import draw_again, pair_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, THEIRS = "#0072b2", "#e69f00"
"""Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in measured["results"] if "missing" not in row]
    missing = [
        f"{row['name']}: {row['missing']}" for row in measured["results"] if "missing" in row
    ]
    figure = Figure(figsize=(9, 1.9 + 0.42 * len(rows)), dpi=120, layout="constrained")
    figure.suptitle(pair_title(measured), weight="bold", size=13)
    axes: Any = figure.subplots()
    for place, row in enumerate(rows):
        ratios = row["over_plain"]
        middle = median(ratios)
        spread = [[middle - min(ratios)], [max(ratios) - middle]]
        axes.barh(place, middle, height=0.62, color=THEIRS if _foreign(row["name"]) else OURS)
        axes.errorbar([middle], [place], xerr=spread, color=INK, capsize=3, linewidth=1)
        text = f"{middle:.2f} ×, {row['identical']:.0%} identical"
        box = {
            "facecolor": WHITE,
            "edgecolor": "none",
            "pad": 1,
        }  # over the line that marks plain decoding
        at = {"textcoords": "offset points", "xytext": (7, 0), "va": "center", "size": 9}
        axes.annotate(text, (max(ratios), place), bbox=box, **at)
    axes.axvline(1, color=SOFT, linestyle=(0, (4, 2)), linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(
        0, 1.35 * max(max(row["over_plain"]) for row in rows)
    )  # leaves room for what stands behind the bars
    axes.set_xlabel(
        "tokens/s over those of our plain decoding" + "".join(f"\n{line}" for line in missing)
    )
    axes.set_title(
        f"{measured['platform']}, {measured['dtype']}, {measured['threads']} threads", size=11
    )
    dress_bars(axes)
    handles = [Patch(color=OURS, label="this package"), Patch(color=THEIRS, label="other engines")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _foreign(name: str) -> bool:
    return name.startswith(("transformers", "llama.cpp", "vLLM"))


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_peers", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
