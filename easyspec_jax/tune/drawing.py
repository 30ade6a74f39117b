"""Style shared by all pictures, and reproducible PNG files. Needs matplotlib, an optional extra."""

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from easyspec_jax.errors import EasySpecError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, FAINT, WHITE = "#1f1f1f", "#5a5a5a", "#e4e4e4", "#ffffff"

STYLE: dict[str, Any] = {
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
    """Raise EasySpecError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EasySpecError("drawing needs matplotlib: pip install '.[experiments]'") from None


def dress_bars(axes: Any) -> None:
    """Style a horizontal bar chart: vertical grid lines only, drawn behind the bars."""
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelcolor=INK)


def png(make: Callable[[], "Figure"], style: Mapping[str, Any] = STYLE) -> bytes:
    """Draw a figure and return it as a PNG file. The same figure gives the same bytes.

    Args:
        make: Draws the figure; called with the style in force.
        style: matplotlib's rcParams.

    Raises:
        EasySpecError: matplotlib is not installed.
    """
    check_drawing()
    import matplotlib

    written = io.BytesIO()
    # By default matplotlib writes its version into the file, which would change the bytes.
    with matplotlib.rc_context(dict[Any, Any](style)):
        make().savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
