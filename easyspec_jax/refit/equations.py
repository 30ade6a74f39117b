"""Ridge regression from sums over the data, which come batch by batch."""

import numpy as np
from jaxtyping import Float


class NormalEquations:
    """Sums of xᵀx and xᵀy in float64; their size does not depend on how many x and y have been added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._xx, self._xy = np.zeros((inputs, inputs)), np.zeros((inputs, outputs))
        self._count = 0

    def add(
        self,
        xx: Float[np.ndarray, "inputs inputs"],
        xy: Float[np.ndarray, "inputs outputs"],
        count: int,
    ) -> None:
        """Takes the sums of `count` more pairs."""
        self._xx += xx
        self._xy += xy
        self._count += count

    def solve(
        self, prior: Float[np.ndarray, "inputs outputs"], ridge: float
    ) -> Float[np.ndarray, "inputs outputs"]:
        """The W that minimises Σ |x W - y|² + ridge · count · |W - prior|², in float64."""
        regularised = self._xx + ridge * self._count * np.eye(len(self._xx))
        return prior + np.linalg.solve(regularised, self._xy - self._xx @ prior)
