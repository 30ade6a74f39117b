"""A checkpoint of which some tensors are replaced."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from easyspec_jax.sources import TensorSource, Window


@dataclass(frozen=True)
class Overlay:
    """A TensorSource: what `above` holds, and otherwise what `below` does."""

    below: TensorSource
    above: TensorSource

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**self.below.shapes(), **self.above.shapes()}

    def read(self, name: str, window: Window = ()) -> np.ndarray:
        return (self.above if name in self.above.shapes() else self.below).read(name, window)
