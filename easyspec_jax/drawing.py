"""Style shared by all pictures, and files that depend on nothing but what is drawn. Drawing is an extra."""

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
    """Raises EasySpecError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EasySpecError("drawing needs matplotlib: pip install '.[experiments]'") from None


def dress_bars(axes: Any) -> None:
    """The looks of horizontal bars: grid lines across them alone, and behind them."""
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelcolor=INK)


def png(make: Callable[[], "Figure"], style: Mapping[str, Any] = STYLE) -> bytes:
    """A picture, made in a style (matplotlib's rcParams). The same picture gives the same bytes.

    Raises EasySpecError without matplotlib.
    """
    check_drawing()
    import matplotlib

    written = io.BytesIO()
    with matplotlib.rc_context(dict[Any, Any](style)):
        make().savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
