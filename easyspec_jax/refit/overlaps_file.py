"""Overlaps of candidate groups on disk: a refit of another size need not measure them again.

An overlap depends on the draft, the texts and the ridge, but not on the size asked for. So one
search for the largest size serves all smaller ones.
"""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int

from easyspec_jax.refit.borders import COMPARED, EVERY, FITTED, Overlaps
from easyspec_jax.refit.fidelity import DEPTHS
from easyspec_jax.refit.kept import read_kept, write_kept

BORDERS = "borders.json"
"""Name of the file, which lies next to the refits."""

_OVERLAPS = "overlaps"


def overlaps_key(
    fingerprint: str, dtype: str, texts: Int[np.ndarray, "texts tokens"], ridge: float
) -> str:
    """Hash whatever the overlaps of a draft's groups depend on: 64 hexadecimal digits.

    Args:
        fingerprint: The draft's.
        dtype: The one it runs in.
        texts: Token ids that candidates are fitted and compared on.
        ridge: As for `fit`.
    """
    method = f"{fingerprint} {dtype} {ridge} {FITTED} {COMPARED} {EVERY} {DEPTHS} {texts.shape} "
    return hashlib.sha256(method.encode() + texts.astype(np.int32).tobytes()).hexdigest()


def read_overlaps(path: Path, key: str) -> Overlaps:
    """Read the overlaps measured under a key; an empty mapping without such a file.

    Args:
        path: The file.
        key: The result of `overlaps_key`. A file with another key is ignored.
    """
    try:
        rows = read_kept(path, key, _OVERLAPS) or []
        return {
            (range(int(start), int(stop)), int(mlps)): float(overlap)
            for start, stop, mlps, overlap in rows
        }
    except (ValueError, TypeError):
        return {}


def write_overlaps(path: Path, key: str, overlaps: Overlaps) -> None:
    """Write overlaps and their key, whole or not at all.

    Raises:
        EasySpecError: The file cannot be written.
    """
    # Rows of [first layer, layer after the last, MLPs at a time, overlap].
    rows = [[group.start, group.stop, mlps, overlap] for (group, mlps), overlap in overlaps.items()]
    write_kept(path, key, _OVERLAPS, rows)
