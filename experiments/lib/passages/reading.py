"""Results as passages read them, and figures as they write them."""

from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.lib.output import read_results
from experiments.lib.tables import Rows, markdown
from experiments.registry import known


def read(results: Path, name: str) -> Rows:
    """Read the rows of a file of results.

    Raises:
        EasySpecError: It is missing, or is not JSON.
    """
    return read_results(results / f"{name}.json")["results"]


def short(values: Iterable[float]) -> str:
    """Write shares with three digits and without the leading zero.

    Example:
        >>> short([0.8941, 0.871])
        '.894 .871'
    """
    return " ".join(f"{value:.3f}".removeprefix("0") for value in values)


def tabulated(name: str) -> Callable[[Path], str]:
    """Return a passage that is a file of results as its own script tabulates it."""

    def passage(results: Path) -> str:
        about = known(name)
        assert about is not None, f"the registry lists {name}"
        measured = read_results(results / f"{name}.json")
        return markdown(about[0].function("tabulate")(measured))

    return passage
