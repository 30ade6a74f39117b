"""A picture of what was found: step time of the drafts against their acceptance."""

from typing import TYPE_CHECKING, Any

from easyspec_jax.tune.drawing import INK, SOFT, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT = "#d55e00"
MARKERS = "os^DvP"
"""One per tree width, narrowest first."""


def draw(found: dict[str, Any]) -> bytes:
    """Draw the result of report.as_dict() and return it as PNG.

    Raises:
        EasySpecError: matplotlib is not installed.
    """
    return png(lambda: _figure(found))


def _figure(found: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    measured = [
        c
        for c in found["candidates"]
        if c["deepest_acceptance_rate"] is not None and "step" not in c["missing"]
    ]
    widths = sorted({c["speculative"]["tree_width"] or 1 for c in measured})
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    front = sorted(_point(c) for c in measured if c["frontier"])
    if front:
        axes.plot(*zip(*front, strict=True), color=FRONT, zorder=1, label="frontier")
    for width, marker in zip(widths, MARKERS, strict=False):
        points = [_point(c) for c in measured if (c["speculative"]["tree_width"] or 1) == width]
        axes.scatter(
            *zip(*points, strict=True),
            marker=marker,
            color=INK,
            zorder=2,
            label=f"tree width {width}",
        )
    for candidate in measured:
        axes.annotate(
            _name(candidate),
            _point(candidate),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize=8,
            color=SOFT,
        )
    axes.set_title(
        f"{found['target']}, drafted by {found['draft']}, --mesh {found['mesh']}", weight="bold"
    )
    axes.set_xlabel("time of a draft step, ms")
    axes.set_ylabel("share of drafted positions accepted")
    if measured:
        axes.legend()
    return figure


def _point(candidate: dict[str, Any]) -> tuple[float, float]:
    return candidate["step"] * 1e3, candidate["deepest_acceptance_rate"]


def _name(candidate: dict[str, Any]) -> str:
    name = candidate["label"].rpartition(",")[0]  # the marker tells the width
    return f"{name}, {candidate['layer']} × {candidate['tensor']}"
