"""Matrices of experts in MXFP4, as gpt-oss's: floats of 4 bits with a power of two for every 32.

In E = model.layers.N.mlp.experts, with the outputs of gate and up in turn (see `stacked_experts`):

    E.gate_up_proj_blocks   uint8 [experts, 2 * inner, hidden / 32, 16]
    E.gate_up_proj_scales   uint8 [experts, 2 * inner, hidden / 32]

and E.down_proj likewise. A byte has two floats, its lower half the first; a scale is an exponent
plus 127. The sixteen floats of E2M1 are halves of integers up to 12, so int8 with half the scale
holds every weight exactly (OCP Microscaling Formats, version 1.0).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int8

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.checkpoint.stacked_experts import Place, places
from easyspec_jax.checkpoint.stored_matrices import Matrix, Parts
from easyspec_jax.errors import EasySpecError

GROUP = 32
"""Columns that share a scale."""

_BYTES = GROUP // 2
_BIAS = 127
_NAN = 255

_SIZES = (0, 1, 2, 3, 4, 6, 8, 12)  # twice 0, 0.5, 1, 1.5, 2, 3, 4 and 6
_INTEGERS = np.array([*_SIZES, *(-size for size in _SIZES)], np.int8)


@dataclass(frozen=True)
class ExpertScales:
    """Scales of an expert's matrix.

    Attributes:
        parts: Where they are.
        place: Where the expert's matrix is among all.
        groups: Scales of a row.
    """

    parts: Parts
    place: Place
    groups: int

    def read(self, rows: slice) -> Float[np.ndarray, "rows groups"]:
        name, place = f"{self.place.stack}_scales", self.place
        expert = slice(place.expert, place.expert + 1)
        stored = self.parts.source.read(name, (expert, place.outputs(rows)))
        exponents = stored[0, place.first :: place.step]
        if (exponents == _NAN).any():
            raise EasySpecError(f"{self.parts.origin}: {name} holds NaN; fetch it again")
        # One less, because the integers are twice the floats.
        return np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS - 1)


@dataclass(frozen=True)
class ExpertMatrix:
    """A matrix of one expert, as integers.

    Attributes:
        scales: Its scales.
        shape: Its rows and columns.
    """

    scales: ExpertScales
    shape: tuple[int, int]

    @property
    def dtype(self) -> str:
        return "int8"

    @property
    def offsets(self) -> None:
        return None

    def read(self, rows: slice, columns: slice) -> Int8[np.ndarray, "rows columns"]:
        place, source = self.scales.place, self.scales.parts.source
        blocks = slice(columns.start // GROUP, ceil_div(columns.stop, GROUP))
        window = (slice(place.expert, place.expert + 1), place.outputs(rows), blocks)
        stored = source.read(f"{place.stack}_blocks", window)[0, place.first :: place.step]
        # [rows, blocks, 16] -> [rows, blocks, 16, 2] -> [rows, columns of these blocks]
        codes = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
        first = blocks.start * GROUP
        return _INTEGERS[codes[:, columns.start - first : columns.stop - first]]


def matrices(
    parts: Parts, settings: Mapping[str, Any], known: Collection[str]
) -> dict[str, Matrix]:
    """Find the matrices of a checkpoint, as a stored_matrices.Format."""
    found: dict[str, Matrix] = {}
    stored, stacks = parts.source.shapes(), dict[str, tuple[int, int, int]]()
    for name, place in places(sorted(known)):
        if place.is_bias or f"{place.stack}_blocks" not in stored:
            continue
        # Once for each stack: a model has thousands of experts, and a source lists anew each time.
        if place.stack not in stacks:
            stacks[place.stack] = _checked(parts, place)
        experts, rows, groups = stacks[place.stack]
        if place.expert >= experts:
            raise parts.wrong(f"{place.stack}_blocks", f"more than {place.expert} experts")
        shape = rows // place.step, groups * GROUP
        found[name] = ExpertMatrix(ExpertScales(parts, place, groups), shape)
    return found


def _checked(parts: Parts, place: Place) -> tuple[int, int, int]:
    """Check the parts of a stack; return its experts, rows and groups of columns."""
    blocks, scales = f"{place.stack}_blocks", f"{place.stack}_scales"
    shape = parts.take(blocks, "U8")
    if len(shape) != 4 or shape[3] != _BYTES or 0 in shape or shape[1] % place.step:
        raise parts.wrong(blocks, f"(experts, rows, columns / {GROUP}, {_BYTES})")
    if parts.take(scales, "U8") != shape[:3]:
        raise parts.wrong(scales, str(shape[:3]))
    experts, rows, groups, _ = shape
    return experts, rows, groups
