"""Draws what experiments.table2 measured: `python -m experiments.draw_table2 JSON [--out PNG]`.

One bar a way and temperature: seconds for 100 tokens, the mean over all prompt sets, divided into drafting and
verification where those were timed.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from easyspec_jax.drawing import INK, dress_bars, png
from experiments.output import draw_again, pair_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAFTING, VERIFICATION, WHOLE = "#0072b2", "#e69f00", "#bdbdbd"
"""Of Okabe and Ito, and far apart in grey."""


def draw(measured: dict[str, Any]) -> bytes:
    """The picture as PNG. Raises EasySpecError without matplotlib."""
    return png(lambda: _figure(measured))


def _figure(measured: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rows = measured["results"]
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    figure = Figure(figsize=(9, 1.4 + 2.4 * len(temperatures)), dpi=120, layout="constrained")
    figure.suptitle(f"{pair_title(measured)}, --mesh {measured['mesh']}", weight="bold", size=13)
    panels = figure.subplots(len(temperatures), 1, squeeze=False, sharex=True)[:, 0]
    for temperature, axes in zip(temperatures, panels, strict=True):
        _draw_panel(axes, [row for row in rows if row["temperature"] == temperature])
        axes.set_title(f"temperature {temperature:g}", size=11)
    panels[-1].set_xlabel("seconds for 100 tokens")
    handles = {
        label: bars
        for axes in panels
        for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        own = [row for row in rows if row["way"] == way]
        whole, gain = (
            float(np.mean([row[name] for row in own]))
            for name in ("seconds_per_100_tokens", "speedup")
        )
        if "drafting" in own[0]:
            drafting, verification = (
                float(np.mean([row[name] for row in own])) for name in ("drafting", "verification")
            )
            axes.barh(place, drafting, color=DRAFTING, height=0.62, label="drafting")
            axes.barh(
                place,
                verification,
                left=drafting,
                color=VERIFICATION,
                height=0.62,
                label="verification",
            )
            axes.plot([whole, whole], [place - 0.36, place + 0.36], color=INK, label="as it ran")
            end = max(whole, drafting + verification)
        else:
            axes.barh(place, whole, color=WHOLE, height=0.62, label="not divided")
            end = whole
        axes.annotate(
            f"{gain:.2f} ×",
            (end, place),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
            size=9,
        )
    axes.set_yticks(range(len(names := list(dict.fromkeys(row["way"] for row in rows)))), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    dress_bars(axes)


def main(argv: Sequence[str] | None = None) -> int:
    return draw_again("experiments.draw_table2", __doc__, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
