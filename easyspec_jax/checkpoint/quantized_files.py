"""Quantized Hugging Face checkpoints: which format a configuration names, and how it is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from easyspec_jax.checkpoint import awq, compressed_tensors, fp8, gptq, mxfp4
from easyspec_jax.checkpoint.quantized import offset_name, scale_name, whole_window
from easyspec_jax.checkpoint.rounding import INTEGERS
from easyspec_jax.checkpoint.stored_matrices import ByGroup, Format, Matrix, Parts
from easyspec_jax.checkpoint.tensors import Slices, TensorSource
from easyspec_jax.errors import EasySpecError

METHODS: dict[str, Format] = {
    "awq": awq.matrices,
    "compressed-tensors": compressed_tensors.matrices,
    "fp8": fp8.matrices,
    "gptq": gptq.matrices,
    "mxfp4": mxfp4.matrices,
}
"""The format of every supported `quant_method`."""


def quantization(config: Mapping[str, Any], origin: str) -> Mapping[str, Any] | None:
    """Return how a checkpoint is quantized, or None if it is not.

    Args:
        config: The contents of `config.json`.
        origin: Names it in error messages.

    Raises:
        EasySpecError: The method is not supported.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(method, str) or method not in METHODS:
        raise EasySpecError(
            f"{origin}: quantization method {str(method)[:40]!r} is not supported; "
            f"supported: {', '.join(METHODS)}"
        )
    if not isinstance(settings, dict):
        raise EasySpecError(f"{origin}: quantization_config must be an object, not only a name")
    return settings


def assembled(
    source: TensorSource, settings: Mapping[str, Any], known: Collection[str], origin: str
) -> TensorSource:
    """Present the matrices of a quantized checkpoint as `quantized` describes them.

    Args:
        source: Its tensors as they are stored.
        settings: Its `quantization_config`.
        known: The tensors that the model has, by the names they have if nothing is quantized.
        origin: Names it in error messages.

    Raises:
        EasySpecError: The layout is not supported, or parts of a matrix do not fit together.
    """
    parts = Parts(source, origin)
    matrices = METHODS[settings["quant_method"]](parts, settings, known)
    for name in matrices:
        for part in (scale_name(name), offset_name(name)):
            # It would hide the one that is made here, or be added to a matrix without offsets.
            if parts.has(part) and part not in parts.used:
                raise EasySpecError(f"{origin}: {part} does not belong to its format; remove it")
    return Assembled(source, matrices, frozenset(parts.used))


@dataclass(frozen=True)
class Assembled:
    """A source whose matrices are put together from their parts.

    Attributes:
        below: The file.
        matrices: Its matrices in parts, by name.
        used: The tensors that are parts.
    """

    below: TensorSource
    matrices: Mapping[str, Matrix]
    used: frozenset[str]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, str]:
        return self._dtypes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._others(self.below.shapes())
        shapes |= {name: matrix.shape for name, matrix in self.matrices.items()}
        return shapes | {name: (rows, each.groups) for name, (rows, each) in self._by_group.items()}

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        dtypes = self._others(self.below.dtypes())
        dtypes |= {name: matrix.dtype for name, matrix in self.matrices.items()}
        return dtypes | dict.fromkeys(self._by_group, "float32")

    @cached_property
    def _by_group(self) -> dict[str, tuple[int, ByGroup]]:
        """Scales and offsets by name, and the rows of their matrix."""
        found: dict[str, tuple[int, ByGroup]] = {}
        for name, matrix in self.matrices.items():
            if matrix.dtype not in INTEGERS:
                continue
            found[scale_name(name)] = matrix.shape[0], matrix.scales
            if matrix.offsets is not None:
                found[offset_name(name)] = matrix.shape[0], matrix.offsets
        return found

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        if name in self.matrices:
            matrix = self.matrices[name]
            return matrix.read(*whole_window(matrix.shape, window))
        if name not in self._by_group:
            return self.below.read(name, window)
        _, by_group = self._by_group[name]
        rows, groups = whole_window(self._shapes[name], window)
        return by_group.read(rows)[:, groups]

    def _others(self, of_all: Mapping[str, Any]) -> dict[str, Any]:
        return {name: each for name, each in of_all.items() if name not in self.used}
