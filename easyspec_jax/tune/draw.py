"""A picture of what was found: the time of a draft step against how much of the draft is accepted."""

import io
from typing import Any

from easyspec_jax.errors import EasySpecError

INK, SOFT, FAINT, FRONT = "#1f1f1f", "#5a5a5a", "#e4e4e4", "#d55e00"
MARKERS = "os^DvP"
"""By tree width."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": FAINT,
    "legend.frameon": False,
}


def check_drawing() -> None:
    """Raises EasySpecError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EasySpecError("--plot needs matplotlib: pip install '.[experiments]'") from None


def draw(found: dict[str, Any]) -> bytes:
    """The picture as PNG of what report.as_dict() returned; the same figures give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    measured = [
        c for c in found["candidates"] if c["deepest_acceptance_rate"] is not None and "step" not in c["missing"]
    ]
    widths = sorted({c["speculative"]["tree_width"] or 1 for c in measured})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        front = sorted(_point(c) for c in measured if c["frontier"])
        if front:
            axes.plot(*zip(*front, strict=True), color=FRONT, zorder=1, label="frontier")
        for width, marker in zip(widths, MARKERS, strict=False):
            points = [_point(c) for c in measured if (c["speculative"]["tree_width"] or 1) == width]
            axes.scatter(*zip(*points, strict=True), marker=marker, color=INK, zorder=2, label=f"tree width {width}")
        for candidate in measured:
            axes.annotate(
                _name(candidate), _point(candidate), textcoords="offset points", xytext=(6, 4), fontsize=8, color=SOFT
            )
        axes.set_title(f"{found['target']}, drafted by {found['draft']}, --mesh {found['mesh']}", weight="bold")
        axes.set_xlabel("time of a draft step, ms")
        axes.set_ylabel("share of drafted positions accepted")
        if measured:
            axes.legend()
        written = io.BytesIO()
        figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _point(candidate: dict[str, Any]) -> tuple[float, float]:
    return candidate["step"] * 1e3, candidate["deepest_acceptance_rate"]


def _name(candidate: dict[str, Any]) -> str:
    name = candidate["label"].rpartition(",")[0]  # the marker tells the width
    return f"{name}, {candidate['layer']} × {candidate['tensor']}"
