"""Ridge regression from sums over the data, which come batch by batch."""

import numpy as np
from jaxtyping import Float


class NormalEquations:
    """Sums of xᵀx and xᵀy in float64. Their size does not depend on the number of pairs (x, y).

    Args:
        inputs: Length of a row x.
        outputs: Length of a row y.

    Examples:
        Two pairs lie on the line y = 3 x. A small ridge finds the slope. A ridge whose penalty
        weighs as much as the data (2.5 · 2 pairs = Σ x² = 5) stops halfway from the prior.

        >>> x, y = np.array([[1.0], [2.0]]), np.array([[3.0], [6.0]])
        >>> equations = NormalEquations(inputs=1, outputs=1)
        >>> equations.add(x.T @ x, x.T @ y, count=2)
        >>> equations.solve(prior=np.zeros((1, 1)), ridge=1e-9).round(6)
        array([[3.]])
        >>> equations.solve(prior=np.zeros((1, 1)), ridge=2.5).round(6)
        array([[1.5]])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self._xx = np.zeros((inputs, inputs))
        self._xy = np.zeros((inputs, outputs))
        self._count = 0

    def add(
        self,
        xx: Float[np.ndarray, "inputs inputs"],
        xy: Float[np.ndarray, "inputs outputs"],
        count: int,
    ) -> None:
        """Add xᵀx and xᵀy of `count` more pairs."""
        self._xx += xx
        self._xy += xy
        self._count += count

    def solve(
        self, prior: Float[np.ndarray, "inputs outputs"], ridge: float
    ) -> Float[np.ndarray, "inputs outputs"]:
        """Return the W that minimises Σ |x W - y|² + ridge · count · |W - prior|².

        Args:
            prior: The W that an infinite ridge would leave.
            ridge: Weight of the penalty for each pair, above 0.

        Returns:
            W in float64.
        """
        # Where the gradient is zero: (xᵀx + r I) W = xᵀy + r prior, with r = ridge · count.
        # Subtracting (xᵀx + r I) prior on both sides leaves equations for the change D = W - prior:
        # (xᵀx + r I) D = xᵀy - xᵀx prior. A change that is small then loses no digits to the prior.
        regularised = self._xx + ridge * self._count * np.eye(len(self._xx))
        return prior + np.linalg.solve(regularised, self._xy - self._xx @ prior)
