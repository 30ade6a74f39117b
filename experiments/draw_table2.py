"""Draws what experiments.table2 measured: `python -m experiments.draw_table2 JSON [--out PNG]`.

One bar a way and temperature: seconds for 100 tokens, the mean over all prompt sets, divided into drafting and
verification where those were timed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from easyspec_jax import EasySpecError
from easyspec_jax.command import Parser, run_command
from easyspec_jax.config import read_json

INK, SOFT, FAINT = "#1f1f1f", "#5a5a5a", "#e4e4e4"
DRAFTING, VERIFICATION, WHOLE = "#0072b2", "#e69f00", "#bdbdbd"
"""Of Okabe and Ito, and far apart in grey."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
}


def draw(measured: dict[str, Any], out: Path) -> None:
    """Writes the picture as PNG. Raises EasySpecError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise EasySpecError("drawing needs matplotlib: pip install -e '.[experiments]'") from None

    rows = measured["results"]
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.4 + 2.4 * len(temperatures)), dpi=120, layout="constrained")
        title = f"{measured['target']}, drafted by {measured['draft']}, --mesh {measured['mesh']}"
        figure.suptitle(title, weight="bold", size=13)
        panels = figure.subplots(len(temperatures), 1, squeeze=False, sharex=True)[:, 0]
        for temperature, axes in zip(temperatures, panels, strict=True):
            _draw_panel(axes, [row for row in rows if row["temperature"] == temperature])
            axes.set_title(f"temperature {temperature:g}", size=11)
        panels[-1].set_xlabel("seconds for 100 tokens")
        handles = {
            label: bars for axes in panels for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        figure.savefig(out, metadata={"Software": None})


def _draw_panel(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        own = [row for row in rows if row["way"] == way]
        whole, gain = (float(np.mean([row[name] for row in own])) for name in ("seconds_per_100_tokens", "speedup"))
        if "drafting" in own[0]:
            drafting, verification = (
                float(np.mean([row[name] for row in own])) for name in ("drafting", "verification")
            )
            axes.barh(place, drafting, color=DRAFTING, height=0.62, label="drafting")
            axes.barh(place, verification, left=drafting, color=VERIFICATION, height=0.62, label="verification")
            axes.plot([whole, whole], [place - 0.36, place + 0.36], color=INK, label="as it ran")
            end = max(whole, drafting + verification)
        else:
            axes.barh(place, whole, color=WHOLE, height=0.62, label="not divided")
            end = whole
        axes.annotate(f"{gain:.2f} ×", (end, place), textcoords="offset points", xytext=(6, 0), va="center", size=9)
    axes.set_yticks(range(len(names := list(dict.fromkeys(row["way"] for row in rows)))), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="x")
    axes.tick_params(colors=SOFT, labelcolor=INK)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.draw_table2", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the JSON")

    def run(args: Any) -> None:
        measured = read_json(args.json)
        if not isinstance(measured.get("results"), list):
            raise EasySpecError(f"{args.json} holds no 'results' of experiments.table2")
        draw(measured, args.out or args.json.with_suffix(".png"))

    return run_command("experiments.draw_table2", parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
