"""What the pictures of results share: titles and the text behind a bar."""

from collections.abc import Mapping
from typing import Any


def pair_title(measured: Mapping[str, Any]) -> str:
    """Name the pair that a file of results is about."""
    if measured.get("bundled"):
        return "the bundled pair"
    return f"{measured['target']}, drafted by {measured['draft']}"


def draft_title(measured: Mapping[str, Any]) -> str:
    """Name the draft that a file of results is about."""
    return "the bundled draft" if measured.get("bundled") else str(measured["draft"])


def note(axes: Any, text: str, x: float, y: float, gap: float = 4, **style: Any) -> None:
    """Write a text to the right of (x, y), the end of a bar, `gap` points away."""
    shift = {"textcoords": "offset points", "xytext": (gap, 0), "va": "center"}
    axes.annotate(text, (x, y), **(shift | {"size": 9} | style))
