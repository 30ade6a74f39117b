"""Draws what experiments.figure2 measured: `python -m experiments.draw_figure2 JSON [--out PNG]`.

A panel for every way of decoding and a lane for every device, all from the begin of a round and on one scale of time.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import INK, dress_bars, png
from experiments.output import draw_again, pair_title
from experiments.timeline import runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    ".": ("idle", "#dcdcdc"),
    "x": ("in collectives, waiting included", "#e69f00"),
    "c": ("computing", "#0072b2"),
}
"""By the letter of a lane. Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = measured["results"]
    lanes = max(len(row["lanes"]) for row in rows)
    figure = Figure(
        figsize=(12, 1.8 + len(rows) * (0.75 + 0.21 * lanes)), dpi=120, layout="constrained"
    )
    figure.suptitle(
        f"One round on every device: {pair_title(measured)}, --mesh {measured['mesh']}",
        weight="bold",
        size=13,
    )
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        _panel(axes, row)
    panels[-1].set_xlim(0, max(1e3 * row["traced_round_seconds"] for row in rows))
    panels[-1].set_xlabel("milliseconds since the round was dispatched")
    patches = [Patch(facecolor=color, label=name) for name, color in reversed(KINDS.values())]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure


def _panel(axes: "Axes", row: dict[str, Any]) -> None:
    milliseconds = 1e3 * row["bin_seconds"]
    for place, letters in enumerate(row["lanes"].values()):
        # Each over what may show through where it fills a pixel in part.
        for (_, color), shown in zip(KINDS.values(), (".xc", "xc", "c"), strict=True):
            bars = [
                (first * milliseconds, count * milliseconds)
                for first, count in runs(letters, shown)
            ]
            axes.broken_barh(bars, (place - 0.4, 0.8), facecolor=color, linewidth=0)
    split = " × ".join(f"{size} {axis}" for axis, size in row["mesh"].items())
    shares = f"computing {row['computing']:.0%}, in collectives {row['in_collectives']:.0%}, idle {row['idle']:.0%}"
    tokens = f"{row['tokens_per_round']:.2f} tokens a round"
    axes.set_title(f"{row['way']} (mesh {split}): {shares}; {tokens}", size=10.5, color=INK)
    dress_bars(axes)
    axes.set_yticks(range(len(row["lanes"])), list(row["lanes"]), size=8)
    axes.set_ylabel("device")
    axes.set_ylim(len(row["lanes"]) - 0.5, -0.5)


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_figure2", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
