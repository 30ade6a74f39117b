"""A draft whose vocabulary is exchanged for its target's: rows of its embedding and head by id."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np
from jaxtyping import Bool, Int

from easyspec_jax.checkpoint.directory import Checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING, HEAD
from easyspec_jax.checkpoint.quantized import offset_name, scale_name
from easyspec_jax.checkpoint.tensors import Slices, TensorSource

UNKNOWN = "vocabulary.unknown"
"""Tensor to add to logits: -inf at ids that the draft has no token for, 0 at the others."""

_PARTS = (str, scale_name, offset_name)
_TENSORS = tuple(part(matrix) for matrix in (EMBEDDING, HEAD) for part in _PARTS)


@dataclass(frozen=True)
class Translated:
    """A source whose vocabulary tensors have a row for each of the target's ids.

    Rows are gathered in no order, so these tensors are kept in host memory once they are read.

    Attributes:
        below: The draft's tensors.
        draft_ids: The draft's id in place of each of the target's.
        known: Whether it has the same bytes; elsewhere it only stands in when the token is read.
    """

    below: TensorSource
    draft_ids: Int[np.ndarray, " ids"]
    known: Bool[np.ndarray, " ids"]
    _kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = dict(self.below.shapes())
        for name in shapes.keys() & set(_TENSORS):
            shapes[name] = len(self.draft_ids), *shapes[name][1:]
        return shapes | {UNKNOWN: self.known.shape}

    def dtypes(self) -> Mapping[str, str]:
        return {**self.below.dtypes(), UNKNOWN: "float32"}

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        if name == UNKNOWN:
            unknown = np.where(self.known, np.float32(0), np.float32(-np.inf))
            return unknown[window]
        if name not in _TENSORS:
            return self.below.read(name, window)
        rows, *columns = window or (slice(None),)
        return self._whole(name)[(self.draft_ids[rows], *columns)]

    def _whole(self, name: str) -> np.ndarray:
        with self._lock:  # so that threads do not read it at the same time
            if name not in self._kept:
                self._kept[name] = self.below.read(name)
            return self._kept[name]


def translated(
    draft: Checkpoint, draft_ids: Int[np.ndarray, " ids"], known: Bool[np.ndarray, " ids"]
) -> Checkpoint:
    """Return a draft that reads and writes its target's ids.

    Its layers, and so its fingerprint and refits, stay the same.

    Args:
        draft: The draft, with ids of its own.
        draft_ids: Its id in place of each of the target's.
        known: Whether that id has the same bytes.
    """
    return replace(
        draft,
        config=replace(draft.config, vocab_size=len(draft_ids)),
        source=Translated(draft.source, draft_ids, known),
        original=draft.source,
    )
