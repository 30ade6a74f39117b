"""Hidden states of texts on disk, in batches, as they go through a model layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from easyspec_jax.checkpoint.config import ModelConfig
from easyspec_jax.checkpoint.families import EMBEDDING
from easyspec_jax.checkpoint.tensors import TensorSource, row_blocks


@dataclass(frozen=True)
class Batches:
    """Arrays of every batch, in float32, which replace each other on the way through a layer.

    A directory with batches from before is continued.

    Attributes:
        directory: Where they are.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     batches = Batches(Path(directory))
        ...     batches[0] = [np.zeros(2), np.ones(1)]
        ...     [[array.tolist() for array in batch] for batch in batches]
        [[[0.0, 0.0], [1.0]]]
    """

    directory: Path

    def __len__(self) -> int:
        return sum(1 for _ in self.directory.glob("*.npz"))

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int, /) -> list[np.ndarray]:
        with np.load(self._path(number)) as arrays:
            return list(arrays.values())

    def __setitem__(self, number: int, arrays: Sequence[ArrayLike], /) -> None:
        np.savez(self._path(number), *(np.asarray(array, np.float32) for array in arrays))

    def _path(self, number: int) -> Path:
        return self.directory / f"{number}.npz"


def embedded(
    source: TensorSource, config: ModelConfig, ids: Int[np.ndarray, "texts tokens"]
) -> Float[np.ndarray, "texts tokens hidden"]:
    """Look up embeddings, as the first layer is fed them, with one pass over the rows.

    Args:
        source: The model's tensors; the embedding as floats.
        config: The model's.
        ids: Token ids.

    Returns:
        float32.
    """
    shape = source.shapes()[EMBEDDING]
    found = np.empty((*ids.shape, shape[1]), np.float32)
    for rows in row_blocks(shape):
        inside = (ids >= rows.start) & (ids < rows.stop)
        if inside.any():
            found[inside] = source.read(EMBEDDING, (rows,))[ids[inside] - rows.start]
    found *= np.float32(config.embedding_multiplier)
    return found
