"""Rounding errors of matrices, summed over the pieces that each is written in."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from easyspec_jax.checkpoint.rounding import dequantize


class Loss(NamedTuple):
    """The rounding error of a piece of a matrix.

    Attributes:
        lost: The sum of the squares of what it changed.
        squares: The sum of the squares of the exact values.
    """

    lost: float
    squares: float


NO_LOSS = Loss(0.0, 0.0)
"""The loss of a piece that was not rounded."""


def loss_of(
    values: Int[np.ndarray, "rows inner"],
    scale: Float[np.ndarray, "rows groups"],
    exact: Float[np.ndarray, "rows inner"],
    offset: Float[np.ndarray, "rows groups"] | None = None,
) -> Loss:
    """Compare integers, scales and offsets with the numbers that they were rounded from."""
    lost = dequantize(values, scale) - exact
    if offset is not None:
        lost += np.repeat(offset, lost.shape[1] // offset.shape[1], axis=1)
    return Loss(float(np.vdot(lost, lost)), float(np.vdot(exact, exact)))


class Losses:
    """The losses of matrices.

    Examples:
        >>> losses = Losses()
        >>> losses.add("a.weight", Loss(1.0, 40.0))
        >>> losses.add("b.weight", NO_LOSS)
        >>> losses.add("a.weight", Loss(3.0, 60.0))
        >>> losses.relative(["b.weight", "a.weight"])
        {'a.weight': 0.2}
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, name: str, loss: Loss) -> None:
        """Add a piece of a matrix."""
        if loss.squares:
            sums = self._sums.setdefault(name, np.zeros(2))
            sums += loss

    def relative(self, names: Iterable[str]) -> dict[str, float]:
        """Return the root of the squared errors over that of the squares, of each rounded matrix.

        Args:
            names: The matrices in the order to list them: threads add pieces in any order.
        """
        errors = {}
        for name in names:
            if name in self._sums:
                lost, squares = self._sums[name]
                errors[name] = float(np.sqrt(lost / squares))
        return errors
