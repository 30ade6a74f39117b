"""Rounded matrices on disk: where calibration keeps what it has found until all is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from easyspec_jax.checkpoint.quantized import SCALE, whole_window
from easyspec_jax.checkpoint.tensors import Slices


@dataclass(frozen=True)
class RoundedFiles:
    """A TensorSource of int4 matrices and their scales, one file each.

    Values take a byte: NumPy has no files of four bits, and these files are short-lived.

    Attributes:
        directories: The directory of each tensor, by its name.
        sizes: The shape of each.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     path = Path(directory)
        ...     write_rounded(path, "a.weight", np.array([[1, -8]]), np.array([[0.5]]))
        ...     names = {"a.weight": path, "a.weight_scale": path}
        ...     files = RoundedFiles(names, {"a.weight": (1, 2), "a.weight_scale": (1, 1)})
        ...     files.read("a.weight").tolist(), files.read("a.weight_scale").tolist()
        ([[1, -8]], [[0.5]])
    """

    directories: Mapping[str, Path]
    sizes: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.sizes

    def dtypes(self) -> Mapping[str, str]:
        return {name: "float32" if name.endswith(SCALE) else "int4" for name in self.sizes}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        width = self.sizes[name][1]
        rows, columns = whole_window(self.sizes[name], window)
        dtype = np.dtype(np.float32 if name.endswith(SCALE) else np.int8)
        found = np.fromfile(
            self.directories[name] / name,
            dtype,
            count=(rows.stop - rows.start) * width,
            offset=rows.start * width * dtype.itemsize,
        )
        found = found.reshape(-1, width)[:, columns]
        return found if name.endswith(SCALE) else found.astype("int4")


def write_rounded(
    directory: Path,
    name: str,
    values: Int[np.ndarray, "out inner"],
    scale: Float[np.ndarray, "out groups"],
) -> None:
    """Write a matrix and its scales for RoundedFiles."""
    values.astype(np.int8).tofile(directory / name)
    scale.astype(np.float32).tofile(directory / f"{name}{SCALE}")
