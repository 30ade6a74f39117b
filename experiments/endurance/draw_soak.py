"""Draws what experiments.soak measured: `python -m experiments.draw_soak JSON [--out PNG]`.

Resident memory and throughput over rounds, both from zero; what is grey is warm-up.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easyspec_jax.drawing import FAINT, INK, SOFT, png
from experiments.output import draw_again

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#e69f00"
"""Of Okabe and Ito."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    rounds = [row["rounds"] for row in rows]
    memory = [row["resident_bytes"] / 2**20 for row in rows]
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(
        f"{rounds[-1]:,} rounds, --batch-size {measured['batch_size']}: "
        f"memory {measured['memory_growth_percent']:+.2f} %, "
        f"{measured['compilations_after_warm_up']} compilations after warm-up, "
        f"{measured['mismatches']} of {measured['checked']} texts differ",
        weight="bold",
        size=11,
    )
    upper.plot(rounds, memory, color=BLUE, linewidth=2)
    upper.set_ylabel("resident memory, MiB")
    for name, label, color in (
        ("tokens_per_second", "of wall time", BLUE),
        ("tokens_per_cpu_second", "of this process's CPU time", ORANGE),
    ):
        lower.plot(rounds, [row[name] for row in rows], color=color, linewidth=2, label=label)
    lower.set_ylabel("tokens a second")
    lower.set_xlabel("rounds")
    lower.legend(loc="lower right")
    for axes in (upper, lower):
        axes.axvspan(0, measured["warm_up"], color=FAINT, zorder=0)
        axes.set_xlim(0, rounds[-1])
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.tick_params(colors=SOFT, labelcolor=INK)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_soak", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
